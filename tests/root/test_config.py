"""Settings: what is refused, and how; what a patch changes; digests that stay as they are."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from saelab.config import Frozen, digest, read_toml
from saelab.errors import SettingError, SourceError, UsageError
from saelab.study.plan import (
    Arm,
    BaseConfig,
    PlanConfig,
    Run,
    arm_settings,
    cells,
    find_run,
    read_base,
    read_plan,
)

ROOT = Path(__file__).parents[2]


class Inner(Frozen):
    width: int = 3
    names: tuple[str, ...] = ("a", "b")


class Outer(Frozen):
    title: str = "t"
    inner: Inner = Inner()
    spare: Inner | None = None
    many: tuple[Inner, ...] = (Inner(), Inner(width=4))


def message(changes: dict[str, Any], base: Frozen | None = None) -> str:
    with pytest.raises(SettingError) as caught:
        (base or BaseConfig()).patched(changes)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    return str(caught.value)


class TestPatched:
    def test_changes_the_named_fields_and_nothing_else(self) -> None:
        base = Outer()
        patched = base.patched({"inner.width": 7, "many.1.width": 9, "title": "new"})
        assert patched.inner.width == 7 and patched.title == "new"
        assert [inner.width for inner in patched.many] == [3, 9]
        assert patched.model_dump() == {
            **base.model_dump(),
            "title": "new",
            "inner": {"width": 7, "names": ("a", "b")},
            "many": ({"width": 3, "names": ("a", "b")}, {"width": 9, "names": ("a", "b")}),
        }
        assert base == Outer()

    def test_nothing(self) -> None:
        assert Outer().patched({}) == Outer() and BaseConfig().patched({}) == BaseConfig()

    def test_optional_part_comes_and_goes(self) -> None:
        with_spare = Outer().patched({"spare": {"width": 5}})
        assert with_spare.spare == Inner(width=5)
        assert with_spare.patched({"spare.width": 6}).spare == Inner(width=6)
        assert with_spare.patched({"spare": None}) == Outer()

    def test_append(self) -> None:
        patched = Outer().patched({"many+": {"width": 1}, "inner.names+": "c"})
        assert [inner.width for inner in patched.many] == [3, 4, 1]
        assert patched.inner.names == ("a", "b", "c")
        assert Outer().patched({"many.0.names+": "z"}).many[0].names == ("a", "b", "z")

    def test_element_and_whole_list(self) -> None:
        assert Outer().patched({"many.0": {"width": 8}}).many[0] == Inner(width=8)
        assert Outer().patched({"many": []}).many == ()

    def test_parts_of_an_sae(self) -> None:
        base = (
            BaseConfig()
            .patched(
                {
                    "sae.activation": {"kind": "topk", "k": 8},
                    "sae.losses": ["reconstruction"],
                    "sae.losses+": {"kind": "auxk"},
                    "sae.controllers": [],
                    "sae.scaling": "variance",
                }
            )
            .patched({"sae.scaling.tau": 0.25})
        )
        assert [loss.kind for loss in base.sae.losses] == ["reconstruction", "auxk"]
        dumped = base.model_dump(mode="json")["sae"]
        assert dumped["activation"]["k"] == 8 and dumped["scaling"]["tau"] == 0.25
        assert BaseConfig.parse(base.model_dump(mode="json")) == base

    @pytest.mark.parametrize(
        ("changes", "parts"),
        [
            ({"sea.d_sae": 4}, ["sea.d_sae", "no such setting", "did you mean 'sae'?"]),
            ({"sae.d_sea": 4}, ["sae.d_sea", "did you mean 'd_sae'?"]),
            ({"train.learning_rate": 4}, ["train.learning_rate", "no such setting"]),
            ({"sae.scaling.tau": 1}, ["sae.scaling is None here", "no fields"]),
            ({"sae.d_sae.x": 1}, ["sae.d_sae is 1536 here"]),
            ({"sae.losses.2.coefficient": 1}, ["this list has 2 entries"]),
            ({"sae.losses.first": "l1"}, ["this list has 2 entries"]),
            ({"sae.losses.1.coeficient": 1}, ["did you mean 'coefficient'?"]),
            ({"sae.activation": {"kind": "topk", "kk": 3}}, ["kk", "did you mean 'k'?"]),
            ({"sae.activation": {"kind": "topks"}}, ["'topks'", "did you mean 'topk'?", "known:"]),
            ({"sae.activation": "rellu"}, ["sae.activation.kind", "did you mean 'relu'?"]),
            ({"sae.losses": ["relu"]}, ["sae.losses.0.kind", "known: reconstruction"]),
            ({"sae.d_sae": -4}, ["sae.d_sae = -4", "greater than 0"]),
            ({"sae.d_sae": "many"}, ["sae.d_sae = 'many'", "integer"]),
            ({"sae.activation": {"kind": "topk", "k": 0}}, ["sae.activation.k = 0"]),
            ({"train": {"toekns": 5}}, ["train.toekns", "did you mean 'tokens'?"]),
            ({"evaluation.probing": {"tables": [{"nam": 1}]}}, ["tables.0"]),
            ({"layout": "row"}, ["layout = 'row'", "'rows'"]),
            ({"sae.scaling+": "variance"}, ["not a list to append to", "'+'"]),
            ({"sae.activation+": "topk"}, ["not a list to append to"]),
            ({"": 1}, ["no such setting"]),
            ({"train_text.path": "\0"}, ["train_text.path = '\\x00'", "NUL", "leave it out"]),
            ({"model.path": "a\0b"}, ["model.path = 'a\\x00b'", "NUL"]),
            ({"hook_name": "blocks.2\0"}, ["hook_name", "NUL"]),
            ({"train_text.column": ["a", "\0"]}, ["train_text.column.1", "NUL"]),
            ({"evaluation.probing.sources": {"\0": {}}}, ["evaluation.probing.sources", "NUL"]),
            ({"sae.activation": "\0"}, ["sae.activation", "NUL"]),
            ({"hook_name": "\ud800"}, ["hook_name = '\\ud800'", "surrogate"]),
            ({"train.tokens": "\ud800"}, ["train.tokens", "surrogate"]),
            ({"train": {"\udcff": 1}}, ["train", "surrogate"]),
            ({"sae.controllers": [{"kind": "\ud800"}]}, ["controllers.0.kind", "surrogate"]),
            ({"sae.controllers": [{"kind": "l0_target", "start": "\ud800"}]}, ["0.start"]),
            ({"sae.d_sae": True}, ["sae.d_sae = True", "number"]),
            ({"train.lr": True}, ["train.lr = True", "number"]),
            ({"sae.losses.1.coefficient": False}, ["coefficient = False", "number"]),
            ({"evaluation.probing.k_values": [True]}, ["k_values.0 = True", "number"]),
        ],
    )
    def test_refused(self, changes: dict[str, Any], parts: list[str]) -> None:
        text = message(changes)
        assert all(part in text for part in parts), text

    def test_where_a_file_is_named(self) -> None:
        with pytest.raises(SettingError, match=r"plan\.toml\.sede.*did you mean 'seeds'"):
            PlanConfig.parse({"study": "s", "sede": 3}, where="plan.toml")

    def test_what_is_refused_names_the_file_too(self) -> None:
        with pytest.raises(SettingError, match=r"plan\.toml\.primary = '\\x00'"):
            PlanConfig.parse({"study": "s", "primary": "\0"}, where="plan.toml")
        with pytest.raises(SettingError, match=r"plan\.toml\.seeds = True: should be a number"):
            PlanConfig.parse({"study": "s", "seeds": True}, where="plan.toml")

    def test_a_study_without_a_name(self) -> None:
        with pytest.raises(SettingError, match="study = ''.* at least 1 character"):
            PlanConfig.parse({"study": ""})

    def test_booleans_stay_where_they_are_wanted(self) -> None:
        assert BaseConfig().patched({"sae.tied": True}).sae.tied is True

    def test_missing_setting(self) -> None:
        with pytest.raises(SettingError, match="study"):
            PlanConfig.parse({})

    def test_frozen(self) -> None:
        with pytest.raises(ValueError, match="frozen"):
            Outer().title = "x"


class TestDigest:
    def test_by_definition(self) -> None:
        text = '{"a":[1,2.5,null],"b":"x"}'
        wanted = hashlib.sha256(text.encode()).hexdigest()[:16]
        assert digest({"b": "x", "a": (1, 2.5, None)}) == wanted
        assert digest({"a": [1, 2.5, None], "b": "x"}) == wanted
        assert digest({"a": [2.5, 1, None], "b": "x"}) != wanted
        assert Inner().digest() == digest({"width": 3, "names": ["a", "b"]})

    def test_same_in_another_process(self) -> None:
        script = "from saelab.sae import SAEConfig; print(SAEConfig().digest())"
        done = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": "77", "PYTHONPATH": str(ROOT)},
        )
        assert done.stdout.strip() == BaseConfig().sae.digest()

    def test_every_change_shows(self) -> None:
        base = BaseConfig()
        changed = [
            base.patched({name: value}).digest()
            for name, value in {
                "sae.activation": "topk",
                "sae.losses.1.coefficient": 0.1,
                "sae.controllers.0.target": 31,
                "train.lr": 1e-4,
                "sae.scaling": "variance",
            }.items()
        ]
        assert len({base.digest(), *changed}) == 6
        assert base.patched({"sae.activation": "relu"}).digest() == base.digest()


class TestToml:
    def test_shipped_files(self) -> None:
        plan = read_plan(ROOT / "plan.toml")
        for file in sorted((ROOT / "configs").glob("*.toml")):
            base = read_base(file)
            assert BaseConfig.parse(base.model_dump(mode="json")) == base
            base.sae.build(8, d_out=8 if base.target_hooks else None)
        assert (ROOT / plan.base).is_file()

    def test_missing_and_broken(self, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match="does not exist"):
            read_toml(tmp_path / "no.toml")
        (tmp_path / "bad.toml").write_text("a = [1")
        with pytest.raises(SourceError, match=r"bad\.toml is not valid TOML"):
            read_toml(tmp_path / "bad.toml")
        (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
        with pytest.raises(SourceError, match="not valid TOML"):
            read_toml(tmp_path / "binary.toml")


class TestPlan:
    PLAN = PlanConfig(study="s", seeds=4, seeds_other=2, seeds_levels=1, levels=(16,))

    def test_cells_of_a_run(self) -> None:
        run = Run(
            "title",
            [
                Arm("baseline"),
                Arm("main", {"sae.scaling": "variance"}, primary=True),
                Arm("other", {"sae.activation": {"kind": "topk", "k": 9}}),
            ],
        )
        specs = cells(self.PLAN, BaseConfig(), run)
        count = {
            name: [s for s in specs if s.id.arm == name] for name in ("baseline", "main", "other")
        }
        assert {name: len(some) for name, some in count.items()} == {
            "baseline": 5,
            "main": 5,
            "other": 2,
        }
        assert [s.id.seed for s in count["baseline"][:4]] == [s.id.seed for s in count["main"][:4]]
        assert [s.id.level for s in count["baseline"]] == [32, 32, 32, 32, 16]
        assert count["baseline"][4].sae.controllers[0].model_dump()["target"] == 16
        assert count["other"][0].sae.activation.model_dump()["k"] == 32  # at the level compared
        assert len({s.id for s in specs}) == len(specs)

    def test_at_l0_of_a_named_k(self) -> None:
        """An annealed k ends at the level; one whose end is given, or that follows the data, does
        not."""
        said = {"kind": "annealed_k", "end": 31.5}
        for controller, end in (("annealed_k", 12), (said, 31.5), ("rounded_k", None)):
            activation = {"kind": "topk", "k": "k"}
            data = {"d_sae": 64, "activation": activation, "controllers": [controller]}
            sae = BaseConfig.parse({"sae": data}).sae.at_l0(12)
            assert sae.activation.model_dump()["k"] == "k"
            assert sae.controllers[0].model_dump().get("end") == end

    def test_at_l0_without_sparsity_setting(self) -> None:
        sae = BaseConfig().sae.patched(
            {"controllers": [], "losses": ["reconstruction", {"kind": "l1", "coefficient": 0.1}]}
        )
        assert not sae.decides_l0 and not sae.l0_rules(7)
        with pytest.raises(SettingError, match="level = 7: no part of these settings sets"):
            sae.at_l0(7)

    @pytest.mark.parametrize(
        ("arms", "text"),
        [
            ([Arm("a")], "every run trains the baseline"),
            ([Arm("baseline"), Arm("baseline")], "occurs twice"),
            ([Arm("baseline"), Arm("a/b")], "may not"),
            ([Arm("baseline"), Arm("again")], "exactly the settings of 'baseline'"),
            ([Arm("baseline"), Arm("a", {"context": 64})], "shared by all arms"),
            ([Arm("baseline"), Arm("a", {"train.batch_size": 64})], "shared by all arms"),
            ([Arm("baseline"), Arm("a", {"sae.activation": {"kind": "tpk"}})], "'topk'"),
            ([Arm("baseline"), Arm("a", {"sae.d_sae": 8, "sae.activation": "topk"})], "at most"),
            ([Arm("baseline"), Arm("a", {"sae.losses": ["l0"]})], "no thresholds"),
            ([Arm("baseline"), Arm("a", {"sae.controllers": []})], "controller"),
        ],
    )
    def test_impossible_runs_show_before_the_launch(self, arms: list[Arm], text: str) -> None:
        with pytest.raises(UsageError, match=text):
            cells(self.PLAN, BaseConfig(), Run("title", arms))

    @pytest.mark.parametrize("other", ["a", "nobody"])
    def test_a_false_twin_is_refused(self, other: str) -> None:
        arms = [Arm("baseline"), Arm("a", {"sae.d_sae": 80}), Arm("twin", twin_of=other)]
        with pytest.raises(SettingError, match="twin_of = .* must be an arm before this one"):
            cells(self.PLAN, BaseConfig(), Run("title", arms))

    def test_declared_twin(self) -> None:
        run = Run("title", [Arm("baseline"), Arm("twin", twin_of="baseline")])
        assert {s.id.arm for s in cells(self.PLAN, BaseConfig(), run)} == {"baseline", "twin"}

    def test_run_changes_hold_for_all_arms(self) -> None:
        run = Run("title", [Arm("baseline")], {"context": 64})
        assert arm_settings(BaseConfig(), run, run.arms[0]).context == 64

    def test_unknown_run(self) -> None:
        run = Run("title", [Arm("baseline")])
        assert find_run({"run_1": run}, "run_1") is run
        with pytest.raises(SettingError, match="did you mean 'run_1'"):
            find_run({"run_1": run}, "run_11")
