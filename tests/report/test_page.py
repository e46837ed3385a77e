"""report.html as text: what it says, and that nothing in it can become markup or a request."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from pathlib import Path

import matplotlib
import numpy as np
import pyarrow.parquet as pq
import pytest
from made_up_studies import HOSTILE, HOSTILE_ARM, made_up_cells, open_runs, write_study
from run_folders import ARMS, write_run

from saelab.errors import SettingError
from saelab.report import page, verdict_table
from saelab.report.feature_browser import pack_cells
from saelab.report.figure_data import Arrays, scene
from saelab.report.figures import common, placement, style
from saelab.report.figures.placement import places
from saelab.report.page import Study, as_block, ledger, render
from saelab.report.run_data import load
from saelab.runs import schema
from saelab.study.plan import PlanConfig
from saelab.verdict.judge import Comparison
from saelab.verdict.review import differences_of, review


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict]:
    runs = write_study(tmp_path_factory.mktemp("study"))
    return render(Study(open_runs(runs), made_up_cells(), "", ledger(open_runs(runs))))


def block(text: str, name: str) -> dict:
    found = re.search(f'<script type="application/json" id="{name}">(.*?)</script>', text, re.S)
    assert found
    return json.loads(found[1])


def test_no_text_becomes_markup(rendered: tuple[str, dict]) -> None:
    text, _ = rendered
    assert HOSTILE not in text and HOSTILE_ARM not in text
    assert html.escape(HOSTILE_ARM, quote=False).replace("'", "&#39;") in text
    assert len(re.findall("<script", text)) == 3  # two blocks of data and the page's own
    assert HOSTILE_ARM in [
        arm["name"] for arm in block(text, "pictures-data")["runs"]["run_0"]["arms"]
    ]
    assert HOSTILE in block(text, "latents-data")["texts"][0]["strings"]


def test_only_the_pages_own_script_may_run_and_nothing_is_loaded(
    rendered: tuple[str, dict],
) -> None:
    text, _ = rendered
    script = re.findall(r"<script>(.*?)</script>", text, re.S)
    assert len(script) == 1
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert f"default-src 'none'; script-src 'sha256-{digest}'" in text
    assert not re.findall(r"""(?:src|href)=["'](?!#)""", text)
    assert not re.findall(r"url\((?!#)", text)


def test_the_page_says_what_a_study_must_say(rendered: tuple[str, dict]) -> None:
    text, held = rendered
    for said in (
        "One model and one text were used: none covers other models or texts.",
        "No interval over texts: the run has no documents.parquet",
        "seeds: 5 -&gt; 8",  # the deviation
        "exploratory",
        "confirmatory",
        "core/1 · blocks.2.hook_resid_post · 32,632 held-out tokens",
        "made again",  # of the ledger
        "no steps",  # the gate's check
    ):
        assert said in text, said
    assert "not compared" in text.lower() or all(
        c["word"] != "refused" for run in held["runs"] for c in run["comparisons"]
    )
    assert [run["run"] for run in held["runs"]] == ["run_0", "run_1"]
    assert {"verdict", "frontier", "probing", "loss"} <= set(held["runs"][0]["pictures"])
    assert held["browser"][0]["latents"] == 40 and held["attempts"] == 2


def test_the_same_runs_give_the_same_page(tmp_path: Path, rendered: tuple[str, dict]) -> None:
    runs = write_study(tmp_path)
    again, _ = render(Study(open_runs(runs), made_up_cells(), "", ledger(open_runs(runs))))
    assert again == rendered[0]


def test_runs_that_differ_are_said_to(tmp_path: Path) -> None:
    first = write_study(tmp_path / "a", 1)
    second = write_study(tmp_path / "b", 1, sesoi=0.01)
    text, _ = render(Study(open_runs([*first, *second])))
    assert "run_0 and run_0 differ in the plan (sesoi: 0.005 -&gt; 0.01)" in text


def test_runs_differ_in_what_their_primary_metric_was_measured_on(tmp_path: Path) -> None:
    first, second = write_study(tmp_path, primary="sae_top_5_test_accuracy", direction="higher")
    table = pq.read_table(second / "metrics.parquet")
    contexts = [64 if m.startswith("sae_") else 128 for m in table["metric"].to_pylist()]
    at = table.column_names.index("context")
    pq.write_table(table.set_column(at, "context", [contexts]), second / "metrics.parquet")
    assert "context (128 -> 64)" in differences_of(review(first), review(second))


def test_a_page_that_is_too_large_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "LIMIT", 1000)
    with pytest.raises(SettingError, match="--latents"):
        page.write(Study(open_runs(write_study(tmp_path, 1))), tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_block_of_data_cannot_be_ended() -> None:
    data = {"a": "</script><!-- & \u2028"}
    assert not set("<>&\u2028") & set(as_block(data))
    assert json.loads(as_block(data)) == data


# ---------------------------------------------------------------- scenes


def test_a_scene_holds_the_numbers_of_its_picture(tmp_path: Path) -> None:
    run = load(write_run(tmp_path / "run_1"))
    arms, arrays = [*run.arms, *run.controls], Arrays()
    with matplotlib.rc_context(style.STYLE):
        figure = common.frontier(run)
    assert not isinstance(figure, str)
    found = scene(figure, arms, arrays)
    (panel,) = (p for p in found["panels"] if p["title"].startswith("Reconstruction"))
    assert panel["x"]["log"] and [tick[1] for tick in panel["x"]["ticks"]] == ["16", "32", "64"]
    (line,) = (m for m in panel["marks"] if m.get("arm") == 0 and m.get("joined"))
    by_level = {}
    for value in run.values["fvu", ""]:
        if value.arm == arms[0] and value.value is not None:
            by_level.setdefault(value.level, []).append(value.value)
    means = [np.mean(by_level[level]) for level in sorted(by_level)]
    assert arrays.stored[line["y"]] == pytest.approx(means, rel=1e-3)
    assert found["title"].endswith("reconstruction against sparsity")


def test_every_drawn_arm_can_be_toggled(tmp_path: Path) -> None:
    run = load(write_run(tmp_path / "run_1"))
    arms = [*run.arms, *run.controls]
    colors = {look.color for look in style.arm_styles(run).values()}
    for name, picture in common.PICTURES.items():
        with matplotlib.rc_context(style.STYLE):
            figure = picture(run)
        if isinstance(figure, str):
            continue
        marks = [m for p in scene(figure, arms, Arrays())["panels"] for m in p["marks"]]
        assert {m["arm"] for m in marks if "arm" in m}, name
        for axes in figure.axes:
            for line in axes.lines:
                shared = line.get_label() not in arms
                assert not (shared and line.get_color() in colors - {"black"}), (name, line)


def test_long_curves_are_thinned_and_keep_their_ends(tmp_path: Path) -> None:
    run, arrays = load(write_run(tmp_path / "run_1")), Arrays()
    with matplotlib.rc_context(style.STYLE):
        figure = common.loss(run)
    assert not isinstance(figure, str)
    (panel, *_) = scene(figure, run.arms, arrays)["panels"]
    line = next(m for m in panel["marks"] if m["kind"] == "line" and m.get("arm") == 0)
    x = arrays.stored[line["x"]]
    assert len(x) == 100 and x[0] == 0 and x[-1] == pytest.approx(0.5243, rel=1e-3)
    band = next(m for m in panel["marks"] if m["kind"] == "band" and m.get("arm") == 0)
    assert band["x"] == line["x"]
    low, middle, high = (arrays.stored[i] for i in (band["low"], line["y"], band["high"]))
    assert all(a <= b * 1.001 and b <= c * 1.001 for a, b, c in zip(low, middle, high, strict=True))  # type: ignore[operator]


def test_steps_stay_steps() -> None:
    page_ = style.Page([["a"]], 2.0)
    page_.panels["a"].step([0, 1, 2], [5, 3, 4], where="post", label="A", markevery=(1, 2))
    arrays = Arrays()
    (mark,) = scene(page_.finish("t", [], []), ["A"], arrays)["panels"][0]["marks"]
    assert arrays.stored[mark["x"]] == [0, 1, 1, 2, 2]
    assert arrays.stored[mark["y"]] == [5, 5, 3, 3, 4]


# ---------------------------------------------------------------- placement, words, browser


def test_the_scale_knows_the_controls_by_their_names() -> None:
    assert schema.control_arm(schema.FROZEN) == placement.FROZEN
    assert schema.control_arm(schema.PLANTED) == placement.PLANTED


def test_places_run_from_the_frozen_decoder_to_the_baseline(tmp_path: Path) -> None:
    run = load(write_run(tmp_path / "run_1"))
    values = dict(run.values)
    rows = values["fvu", ""]
    kept = type(rows[0])
    frozen = [kept("control:frozen decoder", 0, 32.0, 0.7, "")]
    values["fvu", ""] = [*rows, *frozen]
    with_control = type(run)(run.name, run.title, run.info, run.manifest, values, run.curves)
    found = places(with_control, "fvu")
    assert found["control:frozen decoder"] == [0.0]
    assert np.mean(found["baseline"]) == pytest.approx(1)
    fvu = run.numbers("fvu")
    zero, one = 0.7, np.mean(fvu["baseline"])
    assert found[ARMS[1]] == pytest.approx([(v - zero) / (one - zero) for v in fvu[ARMS[1]]])
    assert places(run, "fvu") == {}


def comparison(word: str, mean: float | None, low: float | None, high: float | None) -> Comparison:
    return Comparison(
        arm="A",
        metric="fvu",
        n=8,
        mean_diff=mean,
        low=low,
        high=high,
        n_baseline=8,
        level=0.05,
        p=0.01,
        sesoi=0.005,
        detectable=0.001,
        needed_seeds=31,
        word=word,
        reason="its L0 is off target",
        exploratory=True,
    )


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (
            ("helps", -0.02, -0.03, -0.01),
            "A helps: FVU is 0.0200 below that of the baseline (interval",
        ),
        (("hurts", 0.02, 0.01, 0.03), "A hurts: FVU is 0.0200 above"),
        (("equivalent", 0.001, -0.001, 0.003), "an effect of 0.005 is excluded."),
        (("cannot tell yet", 0.004, -0.01, 0.02), "about 31 seeds would decide it."),
        (("refused", None, None, None), "A is not compared: its L0 is off target."),
    ],
)
def test_a_verdict_is_a_sentence(found: tuple, said: str) -> None:
    plan = PlanConfig.parse({"study": "s", "seeds": 8})
    assert said in verdict_table.sentence(comparison(*found), plan)


def test_bars_share_a_scale_and_stay_in_their_box() -> None:
    wide, none = comparison("hurts", 0.02, 0.01, 0.03), comparison("refused", None, None, None)
    first, second = verdict_table.bars([wide, none], 0.005)
    assert first.low is not None and first.middle is not None and first.high is not None
    assert 50 < first.low < first.middle < first.high < 100
    assert second.low is None and first.zone == second.zone
    assert first.low - 50 == pytest.approx(2 * (first.zone[1] - 50), abs=0.02)


def test_the_browsers_pieces_hold_every_token_that_is_shown() -> None:
    cells = made_up_cells()
    data = pack_cells(cells)
    (text,) = data["texts"]
    for cell, kept in zip(cells, data["cells"], strict=True):
        for latent, own in zip(cell.latents, kept["latents"], strict=True):
            for example, (context, start, length, peak, firing) in zip(
                latent.examples, own["examples"], strict=True
            ):
                pieces = text["pieces"][str(context)]
                ids = next(i[start - s :][:length] for s, i in pieces if s <= start < s + len(i))
                ids_of = cells[0].texts.ids(context)[start : start + length]
                words = [cells[0].texts.token(token) for token in ids_of]
                assert [text["strings"][i] for i in ids] == words
                assert firing[:2] == [peak, 100]
                assert example.values[peak] == max(example.values)


def test_many_runs_are_drawn_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = [f"run_{i}" for i in range(common.MANY)]
    for name in names:
        write_run(tmp_path / name, ARMS[:2], seeds=2, curves=False, metrics=False)
    (tmp_path / names[1] / "final_info.json").write_text("{", encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        common.draw(dict.fromkeys(names, "title"))
    said = capsys.readouterr()
    drawn = [line for line in said.out.splitlines() if line.endswith("_verdict.png")]
    assert drawn == [f"{name}_verdict.png" for name in names if name != names[1]]
    assert all((tmp_path / line).is_file() for line in drawn)
    assert f"{names[1]}/final_info.json is damaged" in said.err and ended.value.code == 1
