"""Pictures of idea A from made-up run folders: what they show, and when they are left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import marked, panel, picture, words
from run_folders import TARGET, TOKENS, write_run

from saelab.report.figures import common, style
from saelab.report.figures.idea_a import A_PICTURES
from saelab.report.run_data import Run, load
from saelab.storage.atomic import read_json, write_json

ARMS = ("baseline", "A1", "A1 early", "JumpReLU")
SEEDS = 3
STRENGTHS = {"A1": 1e-3, "A1 early": 1e-2}
BUCKETS = ("0-31", "32-63", "64-95", "96-127")


def rows_of(arm: str, seed: int, rng: np.random.Generator) -> dict[tuple[str, str], float]:
    """What a cell of that arm is measured to be."""
    found: dict[tuple[str, str], float] = {("convergence.steps", ""): 0.8 + 0.02 * seed}
    found["position.fvu_late", ""] = 0.2
    for i, bucket in enumerate(BUCKETS):
        where = f"position={bucket}"
        worse = 0.05 if arm == "A1 early" and i > 1 else 0.0
        found["fvu", where] = 0.17 + 0.003 * i + worse + rng.normal(0, 1e-3)
        found["l0", where], found["dead_share", where] = TARGET - i, 0.02 * i
    for i, bucket in enumerate(BUCKETS[:2]):
        found["sae_top_5_test_accuracy", f"position={bucket}"] = 0.7 - 0.02 * i
    if arm.startswith("A1"):
        found |= {("spread.before", ""): 0.8, ("spread.after", ""): 0.1}
        found |= {("moved.beta", ""): -0.4, ("moved.theta", ""): 0.03}
        for scalar in ("beta", "theta"):
            found[f"sensitivity.{scalar}", ""] = -2.0
            for change in ("-10%", "-1%", "+1%", "+10%"):
                for metric in ("fvu", "l0"):
                    key = f"sensitivity.{scalar}.{metric}", f"change={change}"
                    found[key] = 1.5 if metric == "l0" else -2.0
    if arm == "JumpReLU":
        fit = {"temperature": 0.4, "slope": 0.4, "intercept": -1.0, "r2": 0.7}
        found |= {(f"consistency.{name}", ""): value for name, value in fit.items()}
        for latent in range(40):
            variance = float(np.exp(rng.normal(0, 1)))
            found["consistency.variance", f"latent={latent}"] = variance
            threshold = float(np.exp(-1 + 0.4 * np.log(variance) + rng.normal(0, 0.1)))
            found["consistency.threshold", f"latent={latent}"] = threshold
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with everything of idea A."""
    folder = tmp_path_factory.mktemp("a") / "run_1"
    write_run(folder, ARMS, seeds=SEEDS, seeds_other=SEEDS)
    table = pq.read_table(folder / "metrics.parquet").to_pylist()
    rng = np.random.default_rng(0)
    for arm in ARMS:
        for seed in range(SEEDS):
            cell = {"arm": arm, "seed": seed, "level": TARGET, "definition": "x/1", "reason": ""}
            for (metric, slice), value in rows_of(arm, seed, rng).items():
                table.append({"metric": metric, "slice": slice, "value": value, **cell})
    pq.write_table(pa.Table.from_pylist(table), folder / "metrics.parquet")
    curves = pq.read_table(folder / "curves.parquet").to_pylist()
    spread = [row | {"name": "spread", "value": 0.8} for row in curves if row["name"] == "beta"]
    pq.write_table(pa.Table.from_pylist([*curves, *spread]), folder / "curves.parquet")
    manifest = read_json(folder / "manifest.json")
    for arm, c in STRENGTHS.items():
        prior = {"kind": "scalar_prior", "c_beta": c, "c_theta": c}
        manifest["arms"][arm]["changes"] = {"sae.losses+": prior}
    manifest["arms"]["A1 early"]["changes"]["train.positions"] = [0, 64]
    write_json(folder / "manifest.json", manifest)
    return load(folder)


def test_all_are_drawn(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "PICTURES", A_PICTURES)
    lines = dict(common.draw_run(run, tmp_path))
    assert all(lines.values()), lines
    assert {f"run_1_{name}.png" for name in A_PICTURES} <= set(lines)


def test_a_run_without_the_data_is_silent_about_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = {"scalars": common.PICTURES["scalars"], **A_PICTURES}
    monkeypatch.setattr(common, "PICTURES", pictures)
    one = load(write_run(tmp_path / "run_0", ("baseline", "TopK"), seeds=2, scalars=False))
    assert {name for name in A_PICTURES if A_PICTURES[name](one) == ""} == set(A_PICTURES)
    (line,) = (line for line, drawn in common.draw_run(one, tmp_path) if not drawn)
    assert line.startswith("run_0: no scalars picture")


def test_positions_show_where_training_ended_and_the_difference(run: Run) -> None:
    figure = picture(run, "positions")
    _, y = marked(panel(figure, "Against"), "A1 early", run)
    assert (abs(y[:2]) < 0.01).all() and y[2:] == pytest.approx(0.05, abs=0.01)
    dashed = [line for line in panel(figure, "Reconstruction").lines if len(line.get_xdata()) == 2]
    assert [line.get_xdata()[0] for line in dashed] == [63.5]
    assert "A1 early (64 positions)" in words(figure)
    _, y = marked(panel(figure, "Never"), "A1", run)
    assert y == pytest.approx([0, 2, 4, 6])
    x, y = marked(panel(figure, "Probes"), "A1", run)
    assert len(x) == 2 and y == pytest.approx([0.7, 0.68])


def test_elasticities_stand_at_their_changes(run: Run) -> None:
    figure = picture(run, "sensitivity")
    x, y = marked(panel(figure, "beta"), "A1", run)
    assert np.round(x + 0.125).tolist() == [0, 1, 2, 3] and (y == -2).all()
    labels = [label.get_text() for label in figure.axes[-1].get_xticklabels()]
    assert labels == ["-10", "-1", "+1", "+10"]


def test_thresholds_come_with_their_fit(run: Run) -> None:
    figure = picture(run, "thresholds")
    axes = panel(figure, "JumpReLU: temperature 0.40, R²\u00a00.70")
    (dots,) = (line for line in axes.lines if line.get_marker() == ".")
    assert len(dots.get_xdata()) == 40
    fits = [line for line in axes.lines if line.get_color() == "black"]
    assert len(fits) == SEEDS
    x, y = np.log(fits[0].get_xdata()), np.log(fits[0].get_ydata())
    assert (y[1] - y[0]) / (x[1] - x[0]) == pytest.approx(0.4)


def test_the_regulariser_names_strengths_and_measures_distance(run: Run) -> None:
    figure = picture(run, "regulariser")
    axes = panel(figure, "beta")
    assert {text.get_text() for text in axes.texts} == {"0.001", "0.01"}
    x, y = marked(axes, "A1", run)
    ends = [curve.values[-1] for curve in run.curves["beta", "A1"].values()]
    assert x[0] == pytest.approx(0.4) and y[0] == pytest.approx(np.std(ends, ddof=1))


def test_spread_goes_from_before_to_after(run: Run) -> None:
    figure = picture(run, "spread")
    x, y = marked(panel(figure, "Scaled"), "A1", run)
    assert x.tolist() == [0, 1] and y == pytest.approx([0.8, 0.1])
    assert style.arm_styles(run)["baseline"].color not in {
        line.get_color() for line in panel(figure, "Scaled").lines
    }


def test_temperatures_are_the_arms_own(run: Run) -> None:
    taus = {arm: run.curves["tau", arm][0].values[-1] for arm in ARMS[1:]}
    for name, title, metric, unit in (
        ("speed", "Until", "convergence.steps", 100),
        ("temperature", "At L0", "fvu", 1),
    ):
        axes = panel(picture(run, name), title)
        for arm, tau in taus.items():
            x, y = marked(axes, arm, run)
            assert x[0] == pytest.approx(tau)
            assert y[0] == pytest.approx(unit * np.mean(run.numbers(metric)[arm]))
    left = panel(picture(run, "speed"), "Reconstruction loss")
    large = [line.get_xdata()[0] for line in left.lines if line.get_markersize() == 12]
    assert large == pytest.approx([0.82 * TOKENS / 1e6] * len(ARMS))
