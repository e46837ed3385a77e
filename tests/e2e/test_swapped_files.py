"""Every kind of file that a launch reads or leaves is swapped, permuted, renamed or made a link.

A launch must then give the bits of a launch that has nothing cached, or refuse in one sentence;
a command that reads a run must print what it printed before, or refuse. The kinds are found by
walking a project after its launches, so that a new file is tried unasked.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from projects import HELPED_LOSS, Copy, Ended, Project, cli, wait_for
from safetensors.torch import load_file, save_file

PLAN = """\
study = "small"
base = "configs/small.toml"
levels = []
seeds = 2
seeds_levels = 1
target_l0 = 16
"""

BASE = """\
hook_name = "blocks.1.hook_resid_post"
context = 16

[model]
path = "model"

[train_text]
kind = "files"
path = "texts/train"

[eval_text]
kind = "files"
path = "texts/held_out"

[sae]
d_sae = 48
activation = { kind = "topk", k = 16 }
losses = [{ kind = "reconstruction" }, { kind = "auxk" }]
controllers = []
constraints = [{ kind = "unit_norm" }]

[train]
tokens = 1_024
batch_size = 128
lr = 4e-3

[evaluation]
tokens = 500
loss_contexts = 2
snapshots = 2

[evaluation.probing]
entries = "none"
k_values = [1, 2]
train_size = 12
test_size = 6
tables = [{ name = "words", path = "table" }]
"""

HELPER = """
STRENGTH = 0.2
K = 4

import torch
from torch import nn


class TopKSAE(nn.Module):
    def __init__(self, d_in: int, d_sae: int, seed: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        rows = nn.functional.normalize(torch.randn(d_sae, d_in, generator=g), dim=1)
        self.W_dec, self.W_enc = nn.Parameter(rows.clone()), nn.Parameter(rows.clone())

    def encode(self, x):
        values, latents = torch.relu(x @ self.W_enc.T).topk(K + 12, dim=-1)
        return torch.zeros(len(x), self.d_sae).scatter(-1, latents, values)

    def decode(self, f):
        return f @ self.W_dec

    def loss(self, x):
        return (self.decode(self.encode(x)) - x).square().sum(-1).mean()
"""

TABLE = """\
from saelab.launch.entry import main
from saelab.study.plan import Arm, Run
{code}
BASELINE = Arm("baseline")
SQUARE = Arm("square", {{"sae.losses+": {{"kind": "square"}}}}, primary=True)
OWN = Arm("own", {{"train.lr": 1e-3}}, module=helper.TopKSAE)
RUNS = {{
    "run_1": Run("One", [BASELINE, SQUARE, OWN]),
    "run_2": Run("Two", [BASELINE, OWN], {{"evaluation.probing.test_size": 5}}),
}}

if __name__ == "__main__":
    main(RUNS, __file__)
"""

WORDS = ["return", "None", "True", "False", "yield", "import", "class", "self", "while", "assert"]


# ---- the project -----------------------------------------------------------------------------


def write_model(folder: Path) -> None:
    """A model whose tokenizer is made of several files, none of them tokenizer.json."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    pieces = [chr(code) for code in range(33, 127)]
    special = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    words = [*special.values(), *pieces, *(f"##{piece}" for piece in pieces), *WORDS[:6]]
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPTNeoXConfig(
            vocab_size=len(words) + 4, intermediate_size=24, max_position_embeddings=32, **sizes
        )
        GPTNeoXForCausalLM(config).save_pretrained(folder)
    tokens = {f"{name}_token": value for name, value in special.items()}
    files = {
        "vocab.txt": "\n".join(words) + "\n",
        "tokenizer_config.json": {"tokenizer_class": "BertTokenizer", "do_lower_case": False},
        "special_tokens_map.json": tokens,
        "added_tokens.json": {word: len(words) + i for i, word in enumerate(WORDS[6:8])},
    }
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text, encoding="utf-8")


def write_texts(folder: Path) -> None:
    """Sentences of made-up order, in two files of each split and in a table with labels."""
    g = torch.Generator().manual_seed(0)

    def sentence(start: str) -> str:
        picked = torch.randint(len(WORDS), (12,), generator=g).tolist()
        return " ".join([start, *(WORDS[i] for i in picked)])

    for split, size in (("train", 100), ("held_out", 40)):
        place = folder / "texts" / split
        place.mkdir(parents=True)
        for name in ("a.txt", "b.txt"):
            place.joinpath(name).write_text("\n".join(sentence("x") for _ in range(size)))
    (folder / "table").mkdir()
    for split, size in (("train", 40), ("test", 20)):
        rows = [{"text": sentence("xy"[i % 2]), "label": "ab"[i % 2]} for i in range(size)]
        lines = "\n".join(map(json.dumps, rows))
        folder.joinpath("table", f"{split}.jsonl").write_text(lines)


def make(folder: Path) -> Project:
    (folder / "configs").mkdir(parents=True)
    write_model(folder / "model")
    write_texts(folder)
    project = Project(folder)
    project.write("plan.toml", PLAN)
    project.write("configs/small.toml", BASE)
    project.write("helper.py", HELPER)
    project.write("experiment.py", TABLE.format(code=HELPED_LOSS))
    return project


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Two runs, complete."""
    project = make(tmp_path_factory.mktemp("swapped") / "project")
    for run in ("run_1", "run_2"):
        ended = project.call(f"--out_dir={run}")
        assert ended.code == 0, ended.err
    return project


@pytest.fixture(scope="module")
def interrupted(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Checkpoints of cells in training: the launch was killed when it had finished its first."""
    project = make(tmp_path_factory.mktemp("interrupted") / "project")
    trace = project.folder.with_name("trace")
    launch: Copy = project.start(
        0, SAELAB_CHECKPOINT_SECONDS="0", SAELAB_FAILPOINT=f"{trace}:*/cell.json:1"
    )
    wait_for(lambda: trace.is_file(), "the first cell")
    assert launch.wait() < 0
    assert len(list(project.folder.glob(".saelab/resume/*/*.json"))) >= 2
    return project


# ---- the table of files ----------------------------------------------------------------------

#: Files that hold neither a number nor what one is made from: ledgers and what workers printed.
NO_INPUTS = (r"\.saelab/(plan\.json|attempts\.jsonl|logs/.*)", r"stdout", r"stderr", r"trace")


def kind_of(path: Path) -> str:
    """'run_<>/cells/<>/seed<>-l<>_<>/sae.json': a path without what files of a kind differ in."""
    name = re.sub(r"^(run_\d+/cells/)[^/]+", r"\1<>", path.as_posix())
    return re.sub(r"[0-9a-f]{16}|\d+", "<>", name)


def paths_of_kinds(root: Path) -> dict[str, list[Path]]:
    """Kind -> the files, or the folders, of that kind, relative to the root."""
    kinds: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        if "__pycache__" in relative.parts or path.name.endswith(".lock"):
            continue
        kind = kind_of(relative) + "/" * path.is_dir()
        if not any(re.fullmatch(pattern, kind) for pattern in NO_INPUTS):
            kinds.setdefault(kind, []).append(relative)
    return kinds


class Harm(NamedTuple):
    """One change of a project.

    Args:
        name: what is done, to which kind.
        kind: of the file or folder.
        path: of the one that is changed, relative to the project.
        do: changes the project in a folder.
    """

    name: str
    kind: str
    path: Path
    do: Callable[[Path], None]


def harms(root: Path) -> Iterator[Harm]:
    """Everything that is done to a project: each kind of file and folder in every way."""
    kinds = paths_of_kinds(root)
    for kind, paths in kinds.items():
        if pair := differing(root, paths):
            yield Harm(f"swap {kind}", kind, pair[0], lambda r, p=pair: swap(r / p[0], r / p[1]))
        first = paths[0]
        if not kind.endswith("/") and not kind.startswith((".saelab", "run_")):
            for other in siblings(kinds, first):
                name = f"swap {kind} with {other.name}"
                yield Harm(name, kind, first, lambda r, a=first, b=other: swap(r / a, r / b))
            yield Harm(f"permute {kind}", kind, first, lambda r, p=first: permute(r / p))
        yield Harm(f"rename {kind}", kind, first, lambda r, p=first: rename(r / p))


def differing(root: Path, paths: list[Path]) -> tuple[Path, Path] | None:
    """The first two of one kind that differ, neither inside the other."""
    for other in paths[1:]:
        if content(root / paths[0]) != content(root / other):
            return paths[0], other
    return None


def content(path: Path) -> Any:
    if path.is_file():
        return path.read_bytes()
    return {p.relative_to(path): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def siblings(kinds: dict[str, list[Path]], path: Path) -> Iterator[Path]:
    """Other files of the same folder and ending, each pair once."""
    for paths in kinds.values():
        for other in paths:
            if other.parent == path.parent and other.suffix == path.suffix and other > path:
                yield other


def swap(one: Path, other: Path) -> None:
    between = one.with_name("between")
    one.rename(between)
    other.rename(one)
    between.rename(other)


def rename(path: Path) -> None:
    path.rename(path.with_name(f"renamed-{path.name}"))


def permute(file: Path) -> None:
    """Puts parts of the file in another order; it stays a file of its format where that can be."""
    if file.suffix == ".safetensors":
        tensors, last = load_file(file), {}
        for name, tensor in tensors.items():
            before = last.setdefault((tensor.shape, tensor.dtype), name)
            tensors[name], tensors[before] = tensors[before], tensors[name]
        file.unlink()
        save_file({n: t.clone() for n, t in tensors.items()}, file, {"format": "pt"})
        return
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".json":
        data = json.loads(text)
        names, values = list(data), list(data.values())
        text = json.dumps(dict(zip(names, [*values[1:], *values[:1]], strict=True)))
    elif file.suffix in (".py", ".toml"):
        numbers = list(re.finditer(r"(?<![\w.])\d[\d_.e-]*(?!\w)", text))
        a, b = numbers[0], next(n for n in numbers if n[0] != numbers[0][0])
        text = text[: a.start()] + b[0] + text[a.end() : b.start()] + a[0] + text[b.end() :]
    else:
        lines = text.splitlines()
        i = len(lines) // 2
        lines[i], lines[-1] = lines[-1], lines[i]
        text = "\n".join(lines) + "\n"
    file.unlink()
    file.write_text(text, encoding="utf-8")


# ---- launches --------------------------------------------------------------------------------


def result(project: Project, ended: Ended, own_code: bool) -> tuple[Any, Any] | str:
    """Numbers and weights of run_1, or the sentence with which the launch refused; code of the
    user's own that does not run ends as Python ends it."""
    assert own_code or "Traceback" not in ended.err, ended.err
    if ended.code:
        assert ended.last, ended
        return ended.last
    return project.info(), project.weights()


def launched(project: Project, own_code: bool) -> tuple[Any, Any] | str:
    shutil.rmtree(project.folder / "run_1", ignore_errors=True)
    ledger = project.folder / ".saelab" / "comparisons.jsonl"
    ledger.unlink(missing_ok=True)  # another look at a hypothesis has another level
    return result(project, project.call(), own_code)


def check_launch(source: Project, harm: Harm, folder: Path, expected: Any) -> str:
    """Harms a copy of a project and launches it; returns how it ended, or what is wrong.

    Args:
        expected: result without the harm, where it must not change; None where it may.
    """
    project = source.copied(folder)
    harm.do(project.folder)
    if not (project.folder / "experiment.py").is_file():
        return "no launch"
    own_code = harm.kind.endswith(".py")
    found = launched(project, own_code)
    if isinstance(found, str):
        return f"refused: {found}"
    if expected is None:
        shutil.rmtree(project.folder / ".saelab")
        expected = launched(project, own_code)
    return "same bits" if found == expected else f"WRONG: {harm.name}"


def is_made(kind: str) -> bool:
    return kind.startswith(".saelab")


def tried(source: Project, wanted: Callable[[Harm], bool], expected: Any, place: Path) -> list[str]:
    """Tries all harms that are wanted; returns how each ended."""
    ends = []
    for i, harm in enumerate(h for h in harms(source.folder) if wanted(h)):
        folder = place / str(i) / "project"
        before = expected if is_made(harm.kind) else None
        ends.append(f"{check_launch(source, harm, folder, before)} ({harm.name})")
        shutil.rmtree(folder)
    return ends


def report_and_check(ends: list[str]) -> None:
    print(f"{len(ends)} tried", *ends, sep="\n")
    assert not [end for end in ends if end.startswith("WRONG")]


def test_the_table_has_the_files_that_are_there_today(
    finished: Project, interrupted: Project
) -> None:
    """So that the battery can't become empty."""
    kinds = set(paths_of_kinds(finished.folder)) | set(paths_of_kinds(interrupted.folder))
    assert {
        *("model/vocab.txt", "model/special_tokens_map.json", "model/added_tokens.json"),
        *("helper.py", "experiment.py", "plan.toml", "configs/small.toml", "texts/train/a.txt"),
        *("table/train.jsonl", ".saelab/cells/<>/", ".saelab/cells/<>/cell.json"),
        *(".saelab/resume/<>/", ".saelab/resume/<>/<>.json", ".saelab/pairs/<>.json"),
        *(".saelab/activations/<>/", ".saelab/probing/<>/probing.json"),
        *("run_<>/metrics.jsonl", "run_<>/manifest.json"),
        *("run_<>/cells/<>/seed<>-l<>_<>/sae.json", "run_<>/cells/<>/seed<>-l<>_<>/"),
    } <= kinds


#: A few of each group, for every run of the tests; the slow test has all.
FEW = (
    *("swap .saelab/cells/<>/", "swap .saelab/pairs/<>.json", "swap .saelab/activations/<>/"),
    *("permute model/vocab.txt", "permute helper.py"),
)


def test_swapped_caches_and_permuted_inputs_never_give_another_number(
    finished: Project, tmp_path: Path
) -> None:
    expected = finished.info(), finished.weights()
    ends = tried(finished, lambda harm: harm.name in FEW, expected, tmp_path)
    assert len(ends) == len(FEW)
    report_and_check(ends)


def test_swapped_checkpoints_never_give_another_number(
    finished: Project, interrupted: Project, tmp_path: Path
) -> None:
    expected = finished.info(), finished.weights()
    kinds = ("swap .saelab/resume/<>/", "rename .saelab/resume/<>/<>.json")
    ends = tried(interrupted, lambda harm: harm.name in kinds, expected, tmp_path)
    assert len(ends) == len(kinds)
    report_and_check(ends)


@pytest.mark.slow
def test_no_file_that_a_launch_reads_gives_another_number(
    finished: Project, interrupted: Project, tmp_path: Path
) -> None:
    expected = finished.info(), finished.weights()
    ends = tried(finished, lambda harm: not harm.kind.startswith("run_"), expected, tmp_path)
    ends += tried(interrupted, lambda harm: is_made(harm.kind), expected, tmp_path / "resumed")
    assert len(ends) > 60
    report_and_check(ends)


# ---- run folders -----------------------------------------------------------------------------

PARTS = ("--experiment", "experiment.py")
#: Commands that read a run.
COMMANDS = {
    "verdict": ("verdict", "run_1", "--json"),
    "difference": ("difference", "run_1", "square", "baseline"),
    "probing": ("probing", "run_1"),
    "saebench": ("saebench", "run_1", "--out", "result.json"),
    "eval": ("eval", "run_1", "--arm", "baseline", "--arm", "square", "--evals", "core", *PARTS),
    "export": ("export", "run_1", "--arm", "baseline", "--out", "exported"),
    "report": ("report", "run_1", "--latents", "3", "--cells", "2", *PARTS),
    "watch": ("watch", "run_1"),
}


def said(folder: Path, command: str) -> tuple[Any, ...] | str:
    """What a command prints and writes, without times, or how it refuses."""
    ended = cli(folder, *COMMANDS[command])
    assert "Traceback" not in ended.err, ended.err
    if ended.code:
        assert ended.last, ended
        return f"refused: {ended.last}"
    written = content(folder / "exported") if (folder / "exported").is_dir() else {}
    shutil.rmtree(folder / "exported", ignore_errors=True)
    out = re.sub(r"\d{10,}|eval_id.*|[0-9a-f-]{36}|\d+:\d\d|[\d.]+ MB", "", ended.out)
    weights = {name: data for name, data in written.items() if name.suffix != ".json"}
    return ended.code, out.replace(str(folder), ""), weights


def link(path: Path) -> None:
    """The same content, through a link that leads out of the run."""
    root = next(folder for folder in path.parents if (folder / "experiment.py").is_file())
    target = root.parent / "elsewhere" / path.name
    target.parent.mkdir(exist_ok=True)
    path.rename(target)
    path.symlink_to(target)


def is_of_run(kind: str) -> bool:
    """Returns whether files of the kind lie in a run folder, which itself may be moved."""
    return kind.startswith("run_<>/") and kind != "run_<>/"


def run_harms(root: Path) -> Iterator[Harm]:
    """Everything that is done to a run folder."""
    yield from (harm for harm in harms(root) if is_of_run(harm.kind))
    for kind, paths in paths_of_kinds(root).items():
        if is_of_run(kind):
            yield Harm(f"link {kind}", kind, paths[0], lambda r, p=paths[0]: link(r / p))


def check_readers(source: Project, harm: Harm, folder: Path, before: dict[str, Any]) -> list[str]:
    """Harms a copy of a project and reads its run with every command; returns how that ended."""
    project = source.copied(folder)
    harm.do(project.folder)
    ends = []
    for command, expected in before.items():
        if command == "watch" and not harm.name.startswith("link"):
            continue  # it shows metrics.jsonl alone, under the name of the run in there
        found = said(project.folder, command)
        end = found if isinstance(found, str) else "same" if found == expected else "WRONG"
        ends.append(f"{end} ({harm.name}: {command})")
    return ends


def tried_readers(source: Project, wanted: Callable[[Harm], bool], place: Path) -> list[str]:
    original = source.copied(place / "original" / "project")
    before = {command: said(original.folder, command) for command in COMMANDS}
    assert not [end for end in before.values() if isinstance(end, str)]
    ends = []
    for i, harm in enumerate(h for h in run_harms(source.folder) if wanted(h)):
        ends += check_readers(source, harm, place / str(i) / "project", before)
        shutil.rmtree(place / str(i))
    return ends


#: A few for every run of the tests; the slow test has all.
FEW_OF_RUNS = (
    *("swap run_<>/cells/<>/seed<>-l<>_<>/", "swap run_<>/final_info.json"),
    *("link run_<>/metrics.jsonl", "link run_<>/cells/<>/seed<>-l<>_<>/sae.safetensors"),
)


def test_swapped_files_of_a_run_are_never_believed(finished: Project, tmp_path: Path) -> None:
    ends = tried_readers(finished, lambda harm: harm.name in FEW_OF_RUNS, tmp_path)
    assert len(ends) >= 7 * len(FEW_OF_RUNS)
    refused = {end.rpartition("(")[2] for end in ends if end.startswith("refused")}
    for name in FEW_OF_RUNS:
        assert any(place.startswith(name) for place in refused), (name, ends)
    report_and_check(ends)


@pytest.mark.slow
def test_no_file_of_a_run_gives_another_answer(finished: Project, tmp_path: Path) -> None:
    ends = tried_readers(finished, lambda harm: True, tmp_path)
    assert len(ends) > 300
    report_and_check(ends)


def test_a_launch_writes_through_no_link(finished: Project, tmp_path: Path) -> None:
    """Whichever file of the run folder it is; what the link leads to is as before."""
    tries = [harm for harm in run_harms(finished.folder) if harm.name.startswith("link")]
    assert len(tries) >= 12
    for i, harm in enumerate(tries):
        project = finished.copied(tmp_path / str(i) / "project")
        harm.do(project.folder)
        before = content(tmp_path / str(i) / "elsewhere")
        (project.folder / "run_1" / "final_info.json").unlink(missing_ok=True)
        ended = project.call(f"--out_dir={harm.path.parts[0]}")
        remade = harm.path.name == "final_info.json"  # its link was removed above
        assert ended.code == (0 if remade else 2), (harm.name, ended.err)
        assert remade or "is a link" in ended.last
        assert content(tmp_path / str(i) / "elsewhere") == before
        shutil.rmtree(tmp_path / str(i))


def test_cells_that_the_manifest_does_not_name_are_named_and_left_out(
    finished: Project, tmp_path: Path
) -> None:
    """A launch with more seeds has left one, and an arm of its own."""
    project = finished.copied(tmp_path / "project")
    before = said(project.folder, "eval")
    cells = project.folder / "run_1" / "cells"
    first = next((cells / "baseline").iterdir())
    shutil.copytree(first, cells / "baseline" / "seed99-l0_16")
    shutil.copytree(cells / "square", cells / "gone")
    ended = cli(project.folder, *COMMANDS["eval"])
    assert "3 folders (baseline/seed99-l0_16, gone/" in ended.err and "ignored" in ended.err
    assert ended.err.count("does not name") == 1
    assert said(project.folder, "eval") == before
    exported = cli(project.folder, *COMMANDS["export"])
    assert exported.code == 0, exported.err
    assert not list((project.folder / "exported").rglob("seed99*"))
    lone = cli(project.folder, "eval", "run_1/cells/baseline/seed99-l0_16")
    assert lone.code == 2 and "does not name cells/baseline/seed99-l0_16" in lone.last
    shutil.rmtree(first)
    missing = cli(project.folder, *COMMANDS["eval"])
    assert missing.code == 1 and f"{first.name}/sae.safetensors is missing" in missing.last
