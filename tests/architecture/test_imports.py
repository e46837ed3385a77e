"""The direction of imports: each layer imports only from itself and from those before it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import saelab
from saelab.storage.cache import NO_NUMBERS, can_alter_numbers

ROOT = Path(saelab.__file__).parent
#: From the bottom up: rooms (folders) and the few modules at the root. Rooms of one line may import
#: each other. The public surface (`saelab/__init__`) only names modules and loads none.
LAYERS = [
    {"errors", "version", "seeding", "stats", "runtime"},
    {"storage"},
    {"config"},
    {"runs"},
    {"progress"},
    {"distributed"},
    {"assets"},
    {"data"},
    {"kernels"},
    {"parts"},
    {"origin", "sae", "checkpoint", "row_norm"},
    {"formats"},
    {"training"},
    {"checks"},
    {"evals"},
    {"study"},
    {"preflight"},
    {"verdict"},
    {"launch"},
    {"analysis"},
    {"report"},
    {"drivers"},
    {"api"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in sorted(ROOT.rglob("*.py"))}


def imports(file: Path) -> set[str]:
    """Every module of the package that the file imports at run time, anywhere in it."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                visit(child)
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name != "saelab")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports hide the layer"
            found.update(named(str(node.module), alias.name) for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "saelab":
            found.add(named("saelab", node.attr))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(file.read_text(encoding="utf-8")))
    return {name for name in found if name.split(".")[0] == "saelab"}


def named(module: str, name: str) -> str:
    """The module that `from module import name` loads."""
    whole = f"{module}.{name}"
    return whole if whole in MODULES else module


def layer(module: str) -> str:
    return module.split(".")[1] if "." in module else module


EDGES = [(name, target) for name, file in MODULES.items() for target in sorted(imports(file))]


def test_every_module_has_a_layer() -> None:
    assert {layer(name) for name in MODULES} - {"saelab"} == set(LEVEL)
    assert len(EDGES) > 100


def test_direction() -> None:
    upward = [
        f"{name} imports {target}"
        for name, target in EDGES
        if name != "saelab" and (target == "saelab" or LEVEL[layer(target)] > LEVEL[layer(name)])
    ]
    assert not upward


def test_public_surface_loads_nothing() -> None:
    assert imports(ROOT / "__init__.py") == {"saelab.version"}


def test_parts_know_nothing_of_each_other() -> None:
    modules = ("base", "following", "forms", "forward_pass", "resets", "settings")  # hold no part
    modules += ("iterative", "weights", "scalings.temperature")
    shared = {f"saelab.parts.{module}" for module in modules}
    inside = [
        f"{name} imports {target}"
        for name, target in EDGES
        if name.startswith("saelab.parts.")
        and name != "saelab.parts.presets"  # which is above the table of parts
        and target.startswith("saelab.parts")
        and target not in shared
        and target.split(".")[2:3] != name.split(".")[2:3]  # a part may be a package
    ]
    assert not inside


def test_nobody_outside_knows_a_part() -> None:
    """The seams and the tables are all that is imported: what a part is, it says itself."""
    outside = [
        f"{name} imports {target}"
        for name, target in EDGES
        if target.startswith("saelab.parts.")
        and not name.startswith("saelab.parts")
        and target not in ("saelab.parts.base", "saelab.parts.presets")
    ]
    assert not outside


def kinds_asked_for(tree: ast.AST, kinds: set[str]) -> list[str]:
    """Places in code where a part is picked by its kind: a comparison of `.kind` or ["kind"], or a
    mapping with a "kind"."""
    found = []
    for node in ast.walk(tree):
        asked: list[ast.AST | None] = []
        if isinstance(node, ast.Compare) and "kind" in ast.unparse(node.left):
            asked = list(node.comparators)
        elif isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            asked = [v for k, v in pairs if isinstance(k, ast.Constant) and k.value == "kind"]
        names = [c.value for a in asked if a for c in ast.walk(a) if isinstance(c, ast.Constant)]
        found += [f"line {node.lineno}: {name}" for name in names if name in kinds]  # type: ignore[attr-defined]
    return found


def test_nobody_outside_picks_parts_by_their_kind() -> None:
    from saelab.parts import TABLE

    kinds = {kind for by_kind in TABLE.values() for kind in by_kind}
    found = {
        name: places
        for name, file in MODULES.items()
        if not name.startswith("saelab.parts")
        and (places := kinds_asked_for(ast.parse(file.read_text(encoding="utf-8")), kinds))
    }
    assert not found
    sick = 'x = [c for c in parts if c["kind"] in ("ramp", "l1")] + [{"kind": "frozen"}]'
    assert len(kinds_asked_for(ast.parse(sick), kinds)) == 3


def test_evaluations_know_nothing_of_training() -> None:
    assert not [
        edge for edge in EDGES if layer(edge[0]) == "evals" and layer(edge[1]) == "training"
    ]


def test_no_cycles() -> None:
    edges: dict[str, set[str]] = {}
    for name, target in EDGES:
        edges.setdefault(name, set()).add(target)
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for target in sorted(edges.get(name, ())):
                visit(target, (*path, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


#: Modules that what a worker runs loads although the package digest leaves them out, and why none
#: of them decides a number.
DECIDE_NOTHING = {
    "saelab.progress": "names the bars",
    "saelab.progress.bar": "bars that probing and harvesting show: they take numbers and give none",
    "saelab.progress.state": "names of stages in the lines that a job sends while it trains",
    "saelab.storage.remote": "moves the bytes of files whose readers compare checksums",
}
#: What the launch loads besides, to say how long its jobs will take and how far they are.
OF_LAUNCH = {
    "saelab.preflight": "names nothing",
    "saelab.preflight.cost": "seconds and bytes that are printed, and compared with limits",
    "saelab.preflight.launch_time": "seconds that are printed, and compared with limits",
    "saelab.preflight.rates": "speed of this machine, from which seconds are estimated",
    "saelab.preflight.sae_probes_cost": "the same of one evaluation",
    "saelab.preflight.preview": "refuses a launch; settings of cells are in their keys",
    "saelab.progress.journal": "lines of metrics.jsonl",
    "saelab.progress.run": "sends them to the journal and the view",
    "saelab.progress.trackers": "sends them to TensorBoard, Weights & Biases or Trackio",
    "saelab.progress.view": "draws them",
}


def all_imports(*modules: str) -> set[str]:
    """The modules with everything that they import, and all packages on the way."""
    loaded: set[str] = set()
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name not in loaded:
            loaded.add(name)
            parent = name.rpartition(".")[0]
            waiting += [parent] if parent in MODULES else []
            waiting += [target for source, target in EDGES if source == name]
    return loaded


@pytest.mark.parametrize(
    ("modules", "excused"),
    [
        # cells, pairs, checkpoints, controls and harvested activations, and `saelab train` on ranks
        ("worker seed_pairs controls prepare distributed", DECIDE_NOTHING),
        ("waves", DECIDE_NOTHING | OF_LAUNCH),  # hands out the jobs and evaluates the controls
    ],
)
def test_what_stores_numbers_counts_for_the_package_digest(
    modules: str, excused: dict[str, str]
) -> None:
    loaded = all_imports(*(f"saelab.launch.{name}" for name in modules.split()))
    assert len(loaded) > 100
    left_out = {
        name for name in loaded if not can_alter_numbers(MODULES[name].relative_to(ROOT).as_posix())
    }
    assert left_out == set(excused)


def test_rooms_without_numbers_exist() -> None:
    for room in NO_NUMBERS:
        assert (ROOT / room).exists(), room


def loaded(statement: str) -> set[str]:
    script = f"import sys; {statement}; print(*(name.split('.')[0] for name in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT.parent
    )
    return set(done.stdout.split())


HEAVY = {
    "torch",
    "pydantic",
    "transformers",
    "matplotlib",
    "numpy",
    "datasets",
    "pyarrow",
    "sklearn",
}


def test_importing_the_package_is_light() -> None:
    assert not loaded("import saelab") & HEAVY


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        (
            "errors seeding version runtime.signals runtime.allocator storage.atomic "
            "storage.remote storage.cache progress",
            set(),
        ),
        ("config", {"pydantic"}),
    ],
)
def test_foundations_load_no_torch(module: str, allowed: set[str]) -> None:
    statement = "import " + ", ".join(f"saelab.{name}" for name in module.split())
    assert not loaded(statement) & (HEAVY - allowed)


def test_statistics_load_no_torch() -> None:
    assert not loaded("import saelab.stats") & (HEAVY - {"numpy"})


def test_each_name_of_the_public_surface_exists() -> None:
    for name in saelab.__all__:
        assert getattr(saelab, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'SAE_'"):
        saelab.SAE_  # noqa: B018
