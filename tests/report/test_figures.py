"""Pictures from made-up run folders: their files, what they show, what they leave alone."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread
from run_folders import ARMS, CHANNELS, TARGET, UNTRAINED, Rows, write_run

from saelab.errors import DamageError, SourceError
from saelab.report.figures import common, style
from saelab.report.run_data import Curve, Run, load
from saelab.storage.atomic import read_json, write_json

ROOT = Path(__file__).parents[2]
ALL = {"loss", "frontier", "probing", "probing_entries", "density", "scalars", "verdict"}
LONG = (
    "baseline",
    "A1 core, started in scaled space",
    "learned schedule with tau_end",
    "A2 with learned beta, permuted",
    "without variance scaling at all",
    "one global scale, whitened input",
    "A1 core on positions 0-63 only",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("full") / "run_1"
    return load(write_run(folder, invalid=[("A literal", 1)]), "Idea A: core")


def picture(run: Run, name: str) -> Figure:
    with matplotlib.rc_context(style.STYLE):
        figure = common.PICTURES[name](run)
    assert isinstance(figure, Figure), figure
    return figure


def reason(run: Run, name: str) -> str:
    text = common.PICTURES[name](run)
    assert isinstance(text, str)
    return text


def words(figure: Figure) -> str:
    """All text outside the panels and in their middle, with line breaks as spaces."""
    texts = [*figure.texts, *(text for axes in figure.axes for text in axes.texts)]
    return " ".join(text.get_text() for text in texts).replace("\n", " ")


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def line_of(axes: Axes, color: str) -> tuple[np.ndarray, np.ndarray]:
    """The data of the one drawn line (with a dash) of that colour."""
    (line,) = (
        line
        for line in axes.lines
        if line.get_color() == color
        and line.get_linestyle() != "None"
        and len(line.get_xdata()) > 2
    )
    return np.asarray(line.get_xdata()), np.asarray(line.get_ydata())


# ---------------------------------------------------------------- files


def test_plot_py_draws_every_picture_of_the_labelled_runs(tmp_path: Path) -> None:
    write_run(tmp_path / "run_1", ARMS[:2], seeds=2)
    write_run(tmp_path / "run_10", ("baseline", "TopK"), seeds=2, scalars=False)
    write_run(tmp_path / "run_99", ("baseline", "TopK"), seeds=2)  # not in plot.py's labels
    (tmp_path / "run_2").mkdir()  # nothing finished
    done = run_plot(tmp_path)
    assert done.returncode == 0, done.stderr
    expected = {f"run_1_{name}.png" for name in ALL} | {
        f"run_10_{name}.png" for name in ALL - {"scalars"}
    }
    assert done.stdout.splitlines() == sorted(expected, key=done.stdout.index)
    assert {path.name for path in tmp_path.glob("*.png")} == expected
    assert {path.stem for path in tmp_path.glob("*.svg")} == {Path(name).stem for name in expected}
    assert done.stderr.splitlines() == [
        "run_10: no scalars picture, no learned scalar moves in any arm (logged: none)"
    ]
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]
    for path in tmp_path.glob("*.png"):
        pixels = imread(path)[..., :3]
        assert pixels.shape[1] == style.WIDTH * style.DPI
        assert (pixels[[0, -1]] == 1).all() and (pixels[:, [0, -1]] == 1).all()  # nothing cut off
    assert "Title of run_10" in svg_comments(tmp_path / "run_10_loss.svg")  # not the package's


def test_a_picture_names_the_k_that_a_rule_moves_where_no_scalar_is_learned(tmp_path: Path) -> None:
    run = load(write_run(tmp_path / "run_1", ARMS[:1], seeds=1, scalars=False))
    k = Curve(np.array([0, 100]), np.array([199.5, 32.0]))
    scalars = {"topk.k": {"meaning": "latents per token", "unit": "latents per token"}}
    curves = {**run.curves, ("topk.k", "baseline"): {0: k}}
    moving = replace(run, curves=curves, manifest=run.manifest | {"scalars": scalars})
    assert common.scalars(moving) == (
        "no learned scalar moves in any arm (logged: none; moved by a rule: topk.k from 199.5 to "
        "32)"
    )


def run_plot(where: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, str(ROOT / "plot.py")],
        cwd=where, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def svg_comments(path: Path) -> str:
    """The text of an SVG; matplotlib draws letters as paths and writes the text beside them."""
    return " ".join(re.findall(r"<!-- (.*?) -->", path.read_text(encoding="utf-8")))


def test_plot_py_without_a_run_says_one_sentence_and_ends_with_2(tmp_path: Path) -> None:
    done = run_plot(tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "experiment.py" in line


def test_a_run_without_a_label_is_named_in_the_remedy(tmp_path: Path) -> None:
    write_run(tmp_path / "run_3", ("baseline",), seeds=1, curves=False, metrics=False)
    with pytest.raises(SourceError, match="add one of run_3 to `labels`"):
        common.find_runs(tmp_path, {"run_1": "x", "../run_3": "y"})


def test_runs_come_in_the_order_of_the_labels(tmp_path: Path) -> None:
    for name in ("run_2", "run_10", "run_1"):
        write_json(tmp_path / name / "final_info.json", {})
    found = common.find_runs(tmp_path, {"run_10": "", "run_0": "", "run_2": ""})
    assert [path.name for path in found] == ["run_10", "run_2"]


def test_a_damaged_run_does_not_keep_the_others_from_being_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run_1", ("baseline", "TopK"), seeds=2, curves=False, metrics=False)
    (tmp_path / "run_1" / "curves.parquet").write_bytes(b"no parquet")
    write_run(tmp_path / "run_2", ("baseline", "TopK"), seeds=2, curves=False, metrics=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        common.draw({"run_1": "one", "run_2": "two"})
    assert end.value.code == 1
    printed = capsys.readouterr()
    assert "run_2_verdict.png" in printed.out and "run_1" not in printed.out
    assert printed.err.startswith("run_1/curves.parquet can't be read")


def test_drawing_leaves_matplotlib_as_it_was(run: Run, tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    for _line, drawn in common.draw_run(run, tmp_path):
        assert drawn and dict(matplotlib.rcParams) == before  # also while the caller is at work
    assert {path.suffix for path in tmp_path.iterdir()} == {".png", ".svg"}


def test_matplotlib_is_imported_late_and_pyplot_never(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from saelab.report.figures import common; "
        "assert 'matplotlib' not in sys.modules and 'torch' not in sys.modules; "
        "from saelab.report.run_data import load; from run_folders import write_run; "
        f"where = pathlib.Path({str(tmp_path)!r}); "
        "write_run(where / 'run_5', ('baseline', 'A'), seeds=2, metrics=False, curves=False); "
        "list(common.draw_run(load(where / 'run_5'), where)); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "helpers")])
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, check=True)


def test_the_same_run_gives_the_same_bytes(run: Run, tmp_path: Path) -> None:
    for part in ("a", "b"):
        (tmp_path / part).mkdir()
        with matplotlib.rc_context(style.STYLE):
            style.save(picture(run, "verdict"), tmp_path / part / "x")
    for name in ("x.png", "x.svg"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


# ---------------------------------------------------------------- what they show


def test_loss_shows_mean_and_range_of_the_seeds(run: Run) -> None:
    figure = picture(run, "loss")
    left, right, relative = figure.axes
    curves = run.curves["loss.reconstruction", "baseline"]
    rows = np.array([curve.values for curve in curves.values()])
    x, y = line_of(left, "black")
    np.testing.assert_allclose(x, curves[0].tokens / 1e6)
    np.testing.assert_allclose(y, rows.mean(0))
    band = left.collections[0].get_paths()[0].vertices  # type: ignore[index]
    assert band[:, 1].min() == pytest.approx(rows.min()) and band[:, 1].max() == rows.max()
    assert left.get_yscale() == right.get_yscale() == "log"
    own = run.curves["loss.reconstruction", "A1 core"]
    ratio = np.mean([100 * (own[s].values / curves[s].values - 1) for s in own], axis=0)
    np.testing.assert_allclose(line_of(relative, style.COLORS[0])[1], ratio, atol=1e-9)
    assert legend(figure) == list(ARMS)
    assert "3 to 8 seeds; band: lowest to highest" in words(figure)


def test_a_seed_that_stopped_early_counts_up_to_there(tmp_path: Path) -> None:
    trace = Rows()
    cells = [(s, t) for s in (0, 1) for t in (0, 1000, 2000) if (s, t) != (1, 2000)]
    for seed, tokens in cells:
        trace.add(name="loss.reconstruction", arm="baseline", seed=seed, level=TARGET,
                  tokens=tokens, step=0, value=1.0 + seed)  # fmt: skip
    write_json(tmp_path / "run_1" / "final_info.json", {"baseline": {"means": {}}})
    trace.write(tmp_path / "run_1" / "curves.parquet")
    one = load(tmp_path / "run_1")
    x, y = line_of(picture(one, "loss").axes[0], "black")
    assert x.tolist() == [0, 1, 2] and y.tolist() == [1.5, 1.5, 1.0]
    assert "curves.parquet has no l0" in words(picture(one, "loss"))


def test_frontier_goes_through_the_means_of_the_levels(run: Run) -> None:
    figure = picture(run, "frontier")
    left = figure.axes[0]
    x, y = line_of(left, "black")
    cells = [v for v in run.values["fvu", ""] if v.arm == "baseline"]
    means = [np.mean([v.value for v in cells if v.level == level]) for level in (16, 32, 64)]
    np.testing.assert_allclose(y, means)
    np.testing.assert_allclose(x, (16, 32, 64), rtol=0.03)
    assert left.get_xscale() == "log"
    assert [label.get_text() for label in left.get_xticklabels()] == ["16", "32", "64"]
    assert "A literal, 1 of 3 seeds (loss not finite at step 120)" in words(figure)


def test_missing_loss_recovered_is_explained_in_its_panel(tmp_path: Path) -> None:
    one = load(write_run(tmp_path / "run_1", seeds=2, loss_recovered=False))
    text = words(picture(one, "frontier"))
    assert "No loss recovered: the model has no language-model head" in text


def test_probing_shows_all_k_and_the_controls_in_grey(run: Run) -> None:
    figure = picture(run, "probing")
    (axes,) = figure.axes
    ticks = [label.get_text() for label in axes.get_xticklabels()]
    assert ticks == ["1", "2", "5", "10", "20", "50", "all"]
    assert set(legend(figure)[-2:]) == {"control: model channels", "control: untrained"}
    looks = style.arm_styles(run)
    assert {looks[CHANNELS].color, looks[UNTRAINED].color} <= set(style.GREYS)
    _, y = line_of(axes, looks[CHANNELS].color)
    rows = run.values["llm_top_5_test_accuracy", ""]
    assert y[2] == rows[0].value and rows[0].seed == -1
    values = run.numbers("sae_top_5_test_accuracy")["A literal"]
    assert len(values) == 2  # the invalid seed is out
    _, y = line_of(axes, looks["A literal"].color)
    assert y[2] == pytest.approx(np.mean(values))


def test_probing_entries_have_a_panel_each(run: Run) -> None:
    figure = picture(run, "probing_entries")
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles[:3] == ["theme", "prose", "expression role"] and len(titles) == 7


def test_density_adds_up_to_all_latents(run: Run) -> None:
    left, right = picture(run, "density").axes
    black = next(patch for patch in right.patches if patch.get_edgecolor()[:3] == (0, 0, 0))
    shares = black.get_data().values  # type: ignore[attr-defined]
    never = np.mean(run.numbers("density_histogram", "log10_density=never")["baseline"])
    assert shares.sum() + 100 * never == pytest.approx(100)
    assert right.get_xlim()[0] < -4.5 and right.get_xlim()[1] >= 0
    assert -1.5 < left.get_ylim()[0] < 0  # in percent: zero is in view


def test_a_bin_without_a_row_is_empty(tmp_path: Path) -> None:
    table = Rows()
    for seed, where, value in ((0, "-1.00", 0.5), (1, "-1.00", 0.3), (1, "-0.50", 0.2)):
        table.add(metric="density_histogram", slice=f"log10_density={where}", value=value,
                  arm="baseline", seed=seed, level=TARGET, reason="")  # fmt: skip
    write_json(tmp_path / "run_1" / "final_info.json", {"baseline": {"means": {}}})
    table.write(tmp_path / "run_1" / "metrics.parquet")
    _, bins = common._histograms(load(tmp_path / "run_1"))
    assert bins == {"baseline": {-1.0: pytest.approx(0.4), -0.5: pytest.approx(0.1)}}


def test_scalars_draw_what_moves_and_name_what_does_not(run: Run) -> None:
    figure = picture(run, "scalars")
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["beta", "theta"]
    thin = [line for line in figure.axes[0].lines if line.get_linewidth() == 0.7]
    assert len(thin) == 8 + 3 * 3  # a line for every seed of the four arms
    assert legend(figure) == list(ARMS[1:])  # the baseline has none
    assert "not drawn: tau (0.1 to 1, by arm)" in words(figure)
    assert "beta: what beta is; theta: what theta is" in words(figure)
    assert [axes.get_ylabel() for axes in figure.axes] == ["beta (no unit)", "theta (no unit)"]


def test_verdict_places_differences_intervals_and_words(run: Run) -> None:
    figure = picture(run, "verdict")
    (axes,) = figure.axes
    means = [run.info[arm]["means"] for arm in ARMS[1:]]
    drawn = [line for line in axes.lines if line.get_markersize() == 9]
    assert [line.get_xdata()[0] for line in drawn] == [m["diff.fvu"] for m in means]  # type: ignore[index]
    bars = [bar.get_segments()[0][:, 0].tolist() for bar in axes.collections]  # type: ignore[attr-defined]
    assert bars == [[m["diff.fvu.low"], m["diff.fvu.high"]] for m in means]
    assert [text.get_text() for text in axes.texts] == [m["verdict.fvu"] for m in means]
    (band,) = axes.patches
    assert (band.get_x(), band.get_x() + band.get_width()) == (-0.005, 0.005)  # type: ignore[attr-defined]
    assert "left of 0 is better" in axes.get_xlabel()


def test_a_refused_comparison_has_a_word_and_no_point(tmp_path: Path) -> None:
    lost = [("TopK", 0), ("TopK", 1)]
    one = load(write_run(tmp_path / "run_1", ("baseline", "TopK"), seeds=2, invalid=lost))
    (axes,) = picture(one, "verdict").axes
    assert [text.get_text() for text in axes.texts] == ["refused"] and not axes.collections
    for name in ALL - {"verdict"}:  # an arm without a single valid cell breaks no picture
        picture(one, name)


# ---------------------------------------------------------------- what is missing


def test_final_info_alone_gives_what_it_holds(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run_1", curves=False, metrics=False, manifest=False)
    one = load(folder, "from final_info.json")
    drawn = dict(common.draw_run(one, tmp_path))
    assert {line for line, ok in drawn.items() if ok} == {
        f"run_1_{name}.png" for name in ("frontier", "probing", "verdict")
    }
    info = read_json(folder / "final_info.json")
    assert one.numbers("fvu")["A literal"] == info["A literal"]["final_info_dict"]["fvu"]


def test_a_run_without_curves_has_no_pictures_of_training(tmp_path: Path) -> None:
    one = load(write_run(tmp_path / "run_1", seeds=2, curves=False))
    assert "curves.parquet" in reason(one, "loss") and "moves" in reason(one, "scalars")
    for name in ALL - {"loss", "scalars"}:
        picture(one, name)


def test_a_run_of_the_baseline_alone(tmp_path: Path) -> None:
    one = load(write_run(tmp_path / "run_0", ("baseline",), seeds=1))
    assert reason(one, "verdict") == "final_info.json holds no verdict"
    assert len(picture(one, "loss").axes) == 2  # nothing to compare
    assert "one seed" in words(picture(one, "loss"))


def test_values_that_a_log_axis_can_not_show_are_no_error(tmp_path: Path) -> None:
    trace = Rows()
    for tokens in range(5):
        for name, value in (("loss.reconstruction", 1.0), ("l0", 0.0), ("theta", math.nan)):
            trace.add(name=name, arm="dead", seed=0, level=TARGET, tokens=tokens, step=0,
                      value=value)  # fmt: skip
    folder = write_run(tmp_path / "run_1", ("dead",), seeds=1, curves=False)
    trace.write(folder / "curves.parquet")
    one = load(folder)
    assert sum(drawn for _, drawn in common.draw_run(one, tmp_path)) == 5
    assert "moves" in reason(one, "scalars")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run_1", ("baseline",), seeds=1, curves=False)
    rows = Rows()
    rows.add(metric="fvu", value=0.2)
    rows.write(folder / "metrics.parquet")
    with pytest.raises(DamageError, match=r"metrics.parquet has no column 'arm'"):
        load(folder)
    write_json(folder / "final_info.json", {"baseline": 3})
    with pytest.raises(DamageError, match=r"final_info.json is damaged \(baseline: "):
        load(folder)


# ---------------------------------------------------------------- arms and text


def test_arms_keep_the_manifest_s_order_and_the_baseline_is_first(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run_1", ("baseline", "zeta", "alpha"), seeds=1, curves=False)
    manifest: dict[str, Any] = read_json(folder / "manifest.json")
    write_json(folder / "manifest.json", {**manifest, "baseline": "zeta"})
    one = load(folder)
    assert one.arms == ("zeta", "baseline", "alpha")
    assert set(one.controls) == {CHANNELS, UNTRAINED}
    assert style.arm_styles(one)["zeta"].color == "black"


def test_twelve_arms_differ_without_colour() -> None:
    arms = [f"arm {i}" for i in range(12)]
    looks = style.arm_styles(Run("run_1", "", {arm: {} for arm in arms}))
    assert len({(look.marker, look.filled, look.dashes) for look in looks.values()}) == 12


def test_text_never_leaves_the_page_or_meets_a_panel(tmp_path: Path) -> None:
    one = load(write_run(tmp_path / "run_1", LONG, seeds=2), "A title " * 12)
    for name in sorted(ALL):
        figure = picture(one, name)
        with matplotlib.rc_context(style.STYLE):
            figure.draw_without_rendering()
            box = figure.bbox
            panels = [axes.get_tightbbox() for axes in figure.axes]
            around = [text.get_window_extent() for text in figure.texts if text.get_text()]
            around += [legend.get_window_extent() for legend in figure.legends]
        for part in [*panels, *around]:
            assert part.x0 >= 0 and part.y0 >= 0 and part.x1 <= box.x1 and part.y1 <= box.y1, name
        for text in around:
            assert not any(text.overlaps(other) for other in panels), name
        for i, text in enumerate(around):
            assert not any(text.overlaps(other) for other in around[:i]), name


def test_wrapped_lines_fit_and_keep_every_word() -> None:
    text = "one two three " * 20 + "a" * 200
    lines = style.wrap(text.strip(), 3.0)
    assert " ".join(lines) == text.strip()
    assert all(style.text_width(line) <= 3.0 for line in lines[:-1])
