"""SAEs on synthetic activations: paired by seed, matched in L0, from Python and from a file."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from saelab import stats
from saelab.cli import app
from saelab.data.activations.store import Source
from saelab.data.activations.stream import batches
from saelab.data.synthetic.chains import SyntheticConfig, generate
from saelab.errors import CellFailure, SettingError
from saelab.evals.base import missing, number
from saelab.launch.synthetic.matched import at_target, differences
from saelab.launch.synthetic.study import SyntheticStudyConfig, read_study, run_study, tune
from saelab.launch.synthetic.table import study_lines, table
from saelab.launch.synthetic.training import Conditions, Outcome, train_on
from saelab.report.figures.synthetic import check_drawable
from saelab.runs.schema import CellId
from saelab.sae import SAEConfig
from saelab.seeding import study_seeds
from saelab.training.loop import Cell, train
from saelab.training.optim import TrainConfig
from saelab.training.sample import initial_sample

SHIPPED = Path(__file__).parents[2] / "configs" / "synthetic"
DATA = {"d": 8, "features": 16, "l0": 2.0, "positions": 16}
TRAIN = TrainConfig(tokens=64 * 60, batch_size=64, lr=5e-3)
RELU = SAEConfig.parse({"d_sae": 16})
TOPK = SAEConfig.parse(
    {
        "d_sae": 16,
        "activation": {"kind": "topk", "k": 3},
        "losses": ["reconstruction"],
        "controllers": [],
    }
)


@pytest.fixture(autouse=True)
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAELAB_PROGRESS", "off")


@pytest.fixture(scope="module")
def data(global_random_seed: int) -> tuple[Source, Source]:
    config = SyntheticConfig.parse(DATA)
    source = generate(config, global_random_seed, 128)
    return source, generate(config, global_random_seed, 32, "held_out")


def run(data: tuple[Source, Source], arms: dict[str, SAEConfig], **options: Any) -> list[Outcome]:
    return train_on(*data, arms, Conditions(**{"seeds": [3], "training": TRAIN} | options))


@pytest.mark.parametrize("layout", ["rows", "contexts"])
def test_a_cell_is_that_of_the_training_loop(data: tuple[Source, Source], layout: Any) -> None:
    (outcome,) = run(data, {"relu": RELU}, layout=layout)
    cell = Cell("alone", RELU, TRAIN, initial_sample(data[0]), 3)
    assert not train([cell], batches(data[0], 3, TRAIN.batch_size, layout))
    for name, tensor in cell.sae.state_dict().items():
        assert torch.equal(tensor, outcome.sae.state_dict()[name]), name
    assert outcome.failure is None and not outcome.sae.training


def test_levels_seeds_and_arms(data: tuple[Source, Source]) -> None:
    found = run(data, {"relu": RELU, "topk": TOPK}, seeds=[3, 4], levels=(2, 4))
    places = [(outcome.arm, outcome.seed, outcome.level) for outcome in found]
    assert places == [(a, s, k) for s in (3, 4) for k in (2, 4) for a in ("relu", "topk")]
    for outcome in found:
        assert {(r.arm, r.seed, r.level) for r in outcome.rows} == {
            (outcome.arm, outcome.seed, outcome.level)
        }
        mcc, chance = outcome.value("mcc"), outcome.value("chance_mcc")
        assert mcc is not None and chance is not None and 0 < chance < 1 and 0 < mcc <= 1
        assert outcome.value("no such metric") is None
    topk = [outcome.value("l0") for outcome in found if outcome.arm == "topk"]
    assert topk == pytest.approx([2, 4, 2, 4], rel=0.1)
    (alone,) = [o for o in run(data, {"topk": TOPK}, seeds=[4]) if o.arm == "topk"]
    assert alone.level == 0


def test_arms_do_not_see_each_other(data: tuple[Source, Source]) -> None:
    (alone,) = run(data, {"relu": RELU}, levels=(3,))
    beside = run(data, {"topk": TOPK, "relu": RELU}, levels=(3,))[1]
    assert torch.equal(alone.sae.W_dec, beside.sae.W_dec)
    assert alone.rows == beside.rows


def test_training_finds_the_features(global_random_seed: int) -> None:
    easy = SyntheticConfig(d=16, features=16, l0=2, orthogonal=True, ratio=2, noise=0.01)
    data = [generate(easy, global_random_seed, 128, part) for part in ("train", "held_out")]
    longer = TRAIN.patched({"tokens": 64 * 600})
    (found,) = run((data[0], data[1]), {"topk": TOPK}, training=longer, levels=(3,))
    mcc, chance = found.value("mcc"), found.value("chance_mcc")
    assert mcc is not None and chance is not None and mcc > chance + 0.1


def test_a_failed_cell_is_missing_with_its_reason() -> None:
    sae = RELU.build(4)
    cells = [
        Outcome(
            arm="a",
            seed=1,
            level=level,
            sae=sae,
            rows=[number(m, v, "core/1") for m, v in (("l0", level), ("fvu", f))],
        )
        for level, f in ((2.0, 0.4), (8.0, 0.2))
    ]
    failure = CellFailure("b", 7, "loss nan")
    broken = [Outcome(arm="b", seed=1, level=2.0, sae=sae, rows=[], failure=failure)]
    rows = at_target([*cells, *broken], "fvu", 4.0)
    assert [(row.arm, row.seed, row.level) for row in rows] == [("a", 1, 4.0), ("b", 1, 4.0)]
    assert rows[0].value == pytest.approx(0.3) and rows[0].definition == "core/1"
    assert rows[1].value is None and "loss nan" in rows[1].reason


def test_differences_are_paired_by_seed() -> None:
    table = {("a", 1): 0.5, ("a", 2): 0.4, ("a", 3): 0.1, ("b", 2): 0.1, ("b", 1): 0.3, ("c", 1): 0}
    rows = [
        number("fvu", v, "core/1").of_cell(CellId(arm, seed, 4)) for (arm, seed), v in table.items()
    ]
    rows.append(missing("fvu", "core/1", "died").of_cell(CellId("b", 3, 4)))
    assert differences(rows, "a", "b") == pytest.approx([0.2, 0.3])
    with pytest.raises(SettingError, match="has no rows"):
        differences(rows, "d", "b")


@pytest.mark.parametrize(
    ("arms", "evals", "setting"),
    [
        ({}, ("core",), "arms"),
        ({"relu": RELU}, ("core", "thruth"), "evals"),
        ({"wide": TOPK.patched({"activation.k": 17})}, ("core",), "wide: activation.k"),
    ],
)
def test_nonsense_is_refused_before_training(
    data: tuple[Source, Source], arms: dict[str, SAEConfig], evals: Any, setting: str
) -> None:
    with pytest.raises(SettingError) as error:
        run(data, arms, evals=evals)
    assert error.value.setting == setting


def test_a_part_that_needs_contexts_gets_them(data: tuple[Source, Source]) -> None:
    learned = {"kind": "tied_threshold", "learned": ["theta", "beta"]}
    moving = TOPK.patched({"activation": learned, "constraints": ["unit_norm"]})
    with pytest.raises(SettingError, match="set layout = 'contexts'") as error:
        run(data, {"topk": TOPK, "moving": moving})
    assert error.value.setting == "moving: layout"
    assert run(data, {"moving": moving}, layout="contexts")[0].failure is None


#: All of a file but the metrics and the arms.
TINY = """\
contexts = 64
held_out_contexts = 8
seeds = 2
target_l0 = 3
levels = [2, 4]
data = { d = 8, features = 16, l0 = 2, positions = 16 }
train = { tokens = 2560, batch_size = 64 }
"""


def arm(name: str, d_sae: int) -> str:
    """A TopK arm of a file."""
    return (
        f"[arms.{name}]\nd_sae = {d_sae}\nactivation = {{ kind = 'topk' }}\n"
        "losses = [{ kind = 'reconstruction' }]\ncontrollers = []\n"
    )


def test_scores_are_shown_with_their_chance_level() -> None:
    benchmark = read_study(SHIPPED / "synth-sae-bench-16k.toml").metrics
    for shown in (benchmark, read_study(SHIPPED / "baselines.toml").metrics):
        assert {"mcc", "uniqueness", "explained_variance"} <= set(shown)
        scores = {name for name in shown if name in ("mcc", "uniqueness", "firing_f1", "latent_f1")}
        assert {f"chance_{name}" for name in scores} <= set(shown)


@pytest.mark.parametrize("name", ["cuda", "abacus"])
def test_a_device_that_is_not_there_is_told_first(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = read_study(SHIPPED / "synth-sae-bench-16k.toml").patched({"device": name})
    with pytest.raises(SettingError, match=f"device = '?{name}"):
        run_study(config)


def test_from_a_file(tmp_path: Path) -> None:
    config = tmp_path / "tiny.toml"
    config.write_text(f'{TINY}\nmetrics = ["fvu", "mcc", "chance_mcc"]\n{arm("topk", 16)}')
    out = tmp_path / "rows.json"
    command = ["synthetic", str(config), "--out", str(out), "--set", "data.positions=8"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].startswith("at L0 3") and lines[1] == "topk"
    assert [line.split()[0] for line in lines[2:5]] == ["fvu", "mcc", "chance_mcc"]
    rows = json.loads(out.read_text())
    assert {row["level"] for row in rows} == {2, 4} and len({row["seed"] for row in rows}) == 2
    again = CliRunner().invoke(app, command)
    assert again.output == result.output
    own = CliRunner().invoke(app, [*command, "--set", "data_seed=own"])
    assert own.exit_code == 0 and own.output != result.output


def test_a_table_pairs_arms_with_the_baseline(tmp_path: Path) -> None:
    config = tmp_path / "tiny.toml"
    dense = "[arms.dense]\nd_sae = 16\nlosses = [{ kind = 'reconstruction' }]\ncontrollers = []\n"
    own = 'seeds = 3\ndata_seed = "own"\nbaseline = "narrow"\nmetrics = ["fvu", "mcc"]'
    tiny = TINY.replace("seeds = 2", own)
    config.write_text(f"{tiny}\n{arm('topk', 16)}{arm('narrow', 8)}{dense}")
    file, picture = tmp_path / "table.json", tmp_path / "drawn"
    command = ["synthetic", str(config), "--table", str(file), "--picture", str(picture)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    table = json.loads(file.read_text())
    topk, narrow = (table["values"][arm]["fvu"] for arm in ("topk", "narrow"))
    expected = stats.paired_summary([a - b for a, b in zip(topk, narrow, strict=True)])
    found = table["differences"]["topk"]["fvu"]
    assert found == pytest.approx(asdict(expected)) and found["n"] == 3
    low, high = found["low"], found["high"]
    assert f"{found['mean']:+.4f} [{low:+.4f}, {high:+.4f}]" in result.output
    assert table["differences"]["dense"]["fvu"] == {"n": 0, "mean": None}
    assert (
        len(table["missing"]) == 3
        and "fvu, mcc" in table["missing"][0]
        and "not extrapolated" in table["missing"][0]
    )
    assert "narrow" not in table["differences"] and len(table["l0"]["narrow"]["4"]) == 3
    assert picture.with_name("drawn.png").read_bytes().startswith(b"\x89PNG")


def test_an_arm_may_be_trained_otherwise(data: tuple[Source, Source]) -> None:
    arms = {"slow": TOPK, "fast": TOPK}
    fast = TRAIN.patched({"lr": 3 * TRAIN.lr})
    slow_alone, fast_alone = (
        run(data, {"slow": TOPK})[0],
        run(data, {"fast": TOPK}, training=fast)[0],
    )
    slow, fast_beside = run(data, arms, otherwise={"fast": fast})
    assert torch.equal(slow.sae.W_enc, slow_alone.sae.W_enc)
    assert torch.equal(fast_beside.sae.W_enc, fast_alone.sae.W_enc)
    assert not torch.equal(slow.sae.W_enc, fast_beside.sae.W_enc)
    with pytest.raises(SettingError, match="the same batches"):
        run(data, arms, otherwise={"fast": TRAIN.patched({"tokens": 2 * TRAIN.tokens})})


def test_an_arm_trained_otherwise_is_an_arm() -> None:
    fields = {"target_l0": 3, "levels": [2, 4], "data": DATA, "arms": {"topk": TOPK}}
    config = SyntheticStudyConfig.parse(fields | {"otherwise": {"topk": {"lr": 0.5}}})
    assert config.trainings() == {"topk": config.train.patched({"lr": 0.5})}
    with pytest.raises(SettingError, match="'topk'"):
        SyntheticStudyConfig.parse(fields | {"otherwise": {"topkk": {}}})


@pytest.mark.parametrize("changes", [{"baseline": "rely"}, {"baseline": None}])
def test_a_picture_needs_a_baseline(changes: dict[str, Any], tmp_path: Path) -> None:
    arms = {"relu": RELU, "topk": TOPK}
    fields = {"target_l0": 3, "levels": [2, 4], "data": DATA, "arms": arms}
    with pytest.raises(SettingError, match="baseline"):
        config = SyntheticStudyConfig.parse(fields | changes)
        check_drawable(config.baseline, list(config.arms))


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("*.toml")), ids=lambda file: file.name)
def test_shipped_files(file: Path) -> None:
    config = read_study(file)
    assert SyntheticStudyConfig.parse(config.model_dump(mode="json")) == config
    assert min(config.levels) < config.target_l0 < max(config.levels)


def test_a_wrong_file_is_one_sentence(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["synthetic", str(tmp_path / "none.toml")])
    assert result.exit_code == 2 and "does not exist" in result.output


# ---------------------------------------------------------------- tuned, calibrated, judged

JUDGED = {
    "study": "judged",
    "data": DATA,
    "contexts": 256,
    "held_out_contexts": 64,
    "train": {"tokens": 64 * 60, "batch_size": 64, "lr": 5e-3},
    "arms": {
        "more": {"preset": "multi_topk", "d_sae": 16},
        "topk": {"preset": "topk", "d_sae": 16},
        "slow": {"preset": "topk", "d_sae": 16},
    },
    "otherwise": {"slow": {"lr": 1e-6}},
    "seeds": 3,
    "target_l0": 3,
    "levels": [3],
    "baseline": "topk",
    "evals": ["core"],
    "metrics": ["fvu"],
    "judged": {"fvu": {"direction": "lower", "sesoi": 0.01}},
}


def test_calibration_brings_the_l0_to_the_target() -> None:
    changes: dict[str, Any] = {"train": TRAIN.patched({"tokens": 25_600}).model_dump()}
    changes |= {"contexts": 1600, "held_out_contexts": 1024, "seeds": 2, "judged": {}}
    changes |= {"arms": {"batch": {"preset": "batchtopk", "d_sae": 16}}, "baseline": None}
    config = SyntheticStudyConfig.parse(JUDGED | changes | {"otherwise": {}})
    as_trained = run_study(config)
    calibrated = run_study(config.patched({"calibration_contexts": 1024}))
    for before, after in zip(as_trained, calibrated, strict=True):
        off = [abs((outcome.value("l0") or 0) / 3 - 1) for outcome in (before, after)]
        assert off[1] < 0.02 < off[0]


def test_one_level_is_enough_within_the_tolerance() -> None:
    (outcome, *_) = run_study(SyntheticStudyConfig.parse(JUDGED | {"seeds": 1}))
    l0, fvu = outcome.value("l0"), outcome.value("fvu")
    assert l0 is not None
    (row,) = at_target([outcome], "fvu", l0 * 1.009, 0.01)
    assert row.value == fvu
    for tolerance in (0.0, 0.008):
        (row,) = at_target([outcome], "fvu", l0 * 1.009, tolerance)
        assert row.value is None and "not extrapolated" in row.reason


def test_words_come_from_intervals_that_hold_together() -> None:
    config = SyntheticStudyConfig.parse(JUDGED)
    outcomes = run_study(config)
    made = table(config, outcomes)
    words = {arm: of_arm["fvu"] for arm, of_arm in made["words"].items()}
    assert words["slow"]["word"] == "hurts" and words["slow"]["low"] > 0.01
    assert words["slow"]["level"] == pytest.approx(0.05 / 2)  # two arms, one metric
    assert words["slow"]["mean"] == pytest.approx(made["differences"]["slow"]["fvu"]["mean"])
    assert any("slow" in line and "hurts: +" in line for line in study_lines(made))


def test_a_lost_cell_takes_the_word_away() -> None:
    config = SyntheticStudyConfig.parse(JUDGED)
    outcomes = run_study(config)
    lost = [replace(o, rows=[]) if o is outcomes[-1] else o for o in outcomes]
    words = table(config, lost)["words"]
    assert words["slow"]["fvu"] == {"word": None, "reason": "1 cell without a value"}
    assert words["more"]["fvu"]["word"] is not None


def test_every_arm_is_tuned_on_seeds_of_its_own() -> None:
    config = SyntheticStudyConfig.parse(JUDGED | {"rates": [1e-6, 5e-3], "otherwise": {}})
    tuned, trials = tune(config)
    assert tuned.otherwise == {arm: {"lr": 5e-3} for arm in config.arms} and tuned.rates == ()
    assert trials["slow"]["1e-06"] > trials["slow"]["0.005"]
    seeds = {outcome.seed for outcome in run_study(tuned)}
    assert not seeds & set(study_seeds("judged", "tune", 2))
    assert tune(tuned) == (tuned, {})
    lines = list(study_lines(table(tuned, run_study(tuned), trials)))
    noted = [line for line in lines if line.endswith("rate tried: a larger one may be better)")]
    assert len(noted) == len(config.arms)


def test_an_arm_that_never_reaches_the_target_keeps_its_rate() -> None:
    arms = {"topk": JUDGED["arms"]["topk"], "dense": {"d_sae": 16, "losses": ["reconstruction"]}}
    changes = {"arms": arms, "rates": [5e-3, 1e-2], "otherwise": {}, "seeds": 1}
    tuned, trials = tune(SyntheticStudyConfig.parse(JUDGED | changes))
    assert trials["dense"] == {"0.005": None, "0.01": None}
    assert tuned.otherwise["dense"] == {"lr": 5e-3}
    text = "\n".join(study_lines(table(tuned, run_study(tuned), trials)))
    assert "learning rates of dense: 0.005: missing, 0.01: missing\n" in text


@pytest.mark.parametrize(
    ("changes", "setting"),
    [({"baseline": None}, "judged"), ({"rates": [1e-3], "judged": {}}, "rates")],
)
def test_what_judging_and_tuning_need(changes: dict[str, Any], setting: str) -> None:
    with pytest.raises(SettingError, match=f"{setting} = .* needs a "):
        SyntheticStudyConfig.parse(JUDGED | changes)
