"""Pictures of idea B from made-up run folders: what they show, and when they are left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import marked, panel, picture, words
from run_folders import STEPS, TARGET, TOKENS, write_run

from saelab.parts.activations.topk import TopKConfig
from saelab.parts.losses.similarity import SimilarityConfig
from saelab.report.figures import common, style
from saelab.report.figures.idea_b import B_PICTURES, REFERENCE
from saelab.report.run_data import Run, load
from saelab.storage.atomic import read_json, write_json

ARMS = ("baseline", "B full", "B neither", "B weight 0", "adaptive topk")
WITH_B = ARMS[1:4]
SEEDS = 3
SNAPSHOTS = [round(TOKENS * share) for share in (0.1, 0.2, 0.4, 0.7, 1.0)]


def rows_of(arm: str, seed: int) -> dict[tuple[str, str], float]:
    """What a cell of that arm is measured to be."""
    found: dict[tuple[str, str], float] = {
        ("spikes", ""): float(seed) if arm == "B full" else 0.0,
        ("stability.rise", ""): 0.01 + 0.002 * seed,
        ("stability.detrended", ""): 4e-4,
        ("stability.gradient_cv", ""): 0.12 + 0.01 * seed,
        ("stability.nonfinite", ""): float(arm == "B neither" and seed == 2),
        ("consistency.chance", ""): 0.3,
        ("consistency.seeds", ""): 0.6,
        ("decoder.max_cosine", ""): 0.45,
    }
    for tokens in SNAPSHOTS:
        value = 1 - 0.4 * (1 - tokens / TOKENS)
        found["consistency.snapshots", f"tokens={tokens}"] = value
    for frequency, value in (("never", 0.31), ("-3", 0.5), ("-2.5", 0.6), ("-2", 0.7)):
        found["consistency.seeds", f"frequency={frequency}"] = value + 0.01 * seed
    for other in range(SEEDS):
        if other != seed:
            found["consistency.seeds", f"seed={other}"] = 0.6 + 0.01 * (seed + other - 2)
    shares = np.exp(-0.5 * ((np.arange(20) - 9) / 3) ** 2)
    for low, share in enumerate(shares / shares.sum()):
        found["decoder.max_cosine", f"bin={low / 20:.2f}"] = float(share)
    if arm in WITH_B:
        rate = 0.1 if arm == "B full" else 0.6
        for age in np.linspace(0.05, 1, 20):
            found["lifetime.survival", f"age={age:.2f}"] = float(np.exp(-rate * age))
            found["lifetime.at_risk", f"age={age:.2f}"] = round(1536 * np.exp(-1.2 * rate * age))
    return found


def curves_of(arm: str, seed: int, u: float) -> dict[str, float]:
    if arm == "adaptive topk":
        return {"topk.k": round(32 + 68 * np.exp(-4 * u)), "k": round(32 + 68 * np.exp(-4 * u))}
    acts = max(0.0, u - 0.2) * (arm != "B weight 0")
    return {
        "alpha": 0.5 - 0.25 * (1 - np.exp(-4 * acts)) + 0.01 * seed,
        "similarity.decoder": 0.2 * (1 - 0.5 * acts) + 0.2 * np.exp(-40 * u),
        "similarity.code": 0.004 * (1 - acts),
        "penalty_share.decoder": 0.2 * acts,
        "penalty_share.code": 0.1 * acts,
        "penalty_share": 0.15 * acts,
        "similarity.k": round(100 + 150 * u),
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with everything of idea B."""
    folder = tmp_path_factory.mktemp("b") / "run_8"
    write_run(folder, ARMS, seeds=SEEDS, seeds_other=SEEDS, scalars=False)
    table = pq.read_table(folder / "metrics.parquet").to_pylist()
    curves = pq.read_table(folder / "curves.parquet").to_pylist()
    for arm in ARMS:
        for seed in range(SEEDS):
            cell = {"arm": arm, "seed": seed, "level": TARGET}
            for (metric, slice), value in rows_of(arm, seed).items():
                row = {"metric": metric, "slice": slice, "value": value}
                table.append(row | cell | {"definition": "x/1", "reason": ""})
            for u in np.arange(1, 201) / 200 if arm != "baseline" else ():
                step = {"step": round(u * STEPS), "tokens": round(u * TOKENS)}
                for name, value in curves_of(arm, seed, u).items():
                    curves.append(cell | step | {"name": name, "value": float(value)})
    pq.write_table(pa.Table.from_pylist(table), folder / "metrics.parquet")
    pq.write_table(pa.Table.from_pylist(curves), folder / "curves.parquet")
    manifest = read_json(folder / "manifest.json")
    for config in (SimilarityConfig(), TopKConfig(k="k")):
        for name, scalar in config.logged.items():
            manifest["scalars"][name] = {"meaning": scalar.meaning, "unit": scalar.unit}
    write_json(folder / "manifest.json", manifest)
    return load(folder)


def test_all_are_drawn(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "PICTURES", B_PICTURES)
    lines = dict(common.draw_run(run, tmp_path))
    assert {f"run_8_{name}.png" for name in B_PICTURES} <= {
        line for line, drawn in lines.items() if drawn
    }


def test_a_run_without_the_data_is_silent_about_them(tmp_path: Path) -> None:
    one = load(write_run(tmp_path / "run_0", ("baseline", "TopK"), seeds=2, scalars=False))
    assert {name for name in B_PICTURES if B_PICTURES[name](one) == ""} == set(B_PICTURES)


def test_the_reference_window_is_the_penaltys() -> None:
    config = SimilarityConfig()
    assert pytest.approx((config.warmup, config.warmup + config.window)) == REFERENCE


def test_stability_counts_spikes_and_names_stopped_cells(run: Run) -> None:
    figure = picture(run, "stability")
    x, y = marked(panel(figure, "Loss spikes"), "B full", run)
    assert (x[0], y[0]) == (1, 1)  # seeds with 0, 1 and 2
    _, y = marked(panel(figure, "Largest rise"), "baseline", run)
    assert y[0] == pytest.approx(1.2)
    assert "B neither, 1 of 3 seeds" in words(figure)
    assert "B full, 1 of" not in words(figure)


def test_alpha_is_drawn_for_arms_that_have_one(run: Run) -> None:
    (axes,) = picture(run, "balance").axes
    _, y = marked(axes, "B full", run)
    assert y[0] == pytest.approx(0.51) and y[-1] == pytest.approx(
        curves_of("B full", 1, 1)["alpha"]
    )
    colors = {line.get_color() for line in axes.lines}
    assert colors == {style.arm_styles(run)[arm].color for arm in WITH_B}
    assert not axes.collections  # a band between frozen numbers would cover the curves


def test_both_terms_are_drawn_raw_and_over_their_reference(run: Run) -> None:
    figure = picture(run, "similarity")
    raw = panel(figure, "Similarity of decoder rows")
    below = [axes for axes in figure.axes if axes.get_title(loc="left") == "Over its reference"]
    for arm in WITH_B:
        _, values = marked(raw, arm, run)
        _, relative = marked(below[0], arm, run)
        us = np.arange(1, 201) / 200
        window = (us > 0.15) & (us <= 0.2)
        assert relative == pytest.approx(values / values[window].mean())
    _, y = marked(below[1], "B full", run)
    assert y[-1] == pytest.approx(0.2)  # of 0.004
    _, y = marked(panel(figure, "Of the gradient at W_dec"), "B full", run)
    assert y[-1] == pytest.approx(16)


def test_the_two_ks_have_a_panel_each(run: Run) -> None:
    figure = picture(run, "latents")
    per_token = panel(figure, "Latents per token, of TopK")
    _, y = marked(per_token, "adaptive topk", run)
    assert y[-1] == pytest.approx(33, abs=1)
    of_codes = panel(figure, "Latents in the similarity of codes")
    _, y = marked(of_codes, "B full", run)
    assert y[-1] == 250
    assert ["L0 32" in [text.get_text() for text in a.texts] for a in (per_token, of_codes)] == [
        True,
        False,
    ]


def test_survival_starts_whole_and_shows_who_is_left(run: Run) -> None:
    figure = picture(run, "survival")
    curves, table = figure.axes
    x, y = marked(curves, "B neither", run)
    assert (x[0], y[0]) == (0, 100) and x[-1] == 100
    assert y[-1] == pytest.approx(100 * np.exp(-0.6))
    colour = style.arm_styles(run)["B neither"].color
    own = [text.get_text() for text in table.texts if text.get_color() == colour]
    first = rows_of("B neither", 0)["lifetime.at_risk", "age=0.05"]
    assert own[0] == f"{first:.0f}" and 4 <= len(own) <= 6


def test_consistency_stands_beside_chance(run: Run) -> None:
    figure = picture(run, "consistency")
    past, seeds = figure.axes
    x, y = marked(past, "B full", run)
    assert x == pytest.approx(np.array(SNAPSHOTS) / 1e6)
    assert y[-1] == 1 and y[0] == pytest.approx(0.64, abs=1e-3)
    labels = [label.get_text() for label in seeds.get_xticklabels()]
    assert labels == ["never", "-3", "-2.5", "-2"]
    _, y = marked(seeds, "B full", run)
    assert y == pytest.approx([0.32, 0.51, 0.61, 0.71])
    # pairs 0.59, 0.60, 0.61: pseudo-values 0.58, 0.60, 0.62, t(2) at 5% / 3: 7.649
    half = 7.649 * 0.02 / 3**0.5
    assert f"98.3% intervals by the jackknife over seeds: baseline {0.6 - half:.3f}" in words(
        figure
    )
    for axes in (past, seeds):
        assert [line.get_ydata()[0] for line in axes.lines if len(line.get_xdata()) == 2] == [
            pytest.approx(0.3)
        ]


def test_largest_cosines_are_shares_of_latents(run: Run) -> None:
    figure = picture(run, "max_cosine")
    (axes,) = figure.axes
    heights = [patch.get_data().values for patch in axes.patches]
    assert len(heights) == len(ARMS) and all(sum(h) == pytest.approx(100) for h in heights)
    near = sum(rows_of("baseline", 0)["decoder.max_cosine", f"bin={b / 20:.2f}"]
               for b in range(10, 20))  # fmt: skip
    assert f"baseline {100 * near:.1f}" in words(figure)
