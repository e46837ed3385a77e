"""report.html in a real browser: `make test-browser` (Playwright drives Debian's Chromium)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_up_studies import HOSTILE, HOSTILE_ARM, made_up_cells, open_runs, write_study

from saelab.report.page import LIMIT, Study, ledger, write

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
CHROMIUM = os.environ.get("SAELAB_CHROMIUM") or shutil.which("chromium")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
]
WIDTHS = (1280, 375)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("study")
    runs = write_study(root)
    out = root / "report.html"
    write(Study(open_runs(runs), made_up_cells(200), "", ledger(open_runs(runs))), out)
    return out


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Open:
    """A page with everything that went wrong on it."""

    def __init__(self, browser: Any, file: Path, width: int, **settings: Any) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, **settings)
        self.context.set_default_timeout(120_000)
        self.page, self.wrong = self.context.new_page(), []
        self.page.on("console", lambda message: self.wrong.append(message.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", self.asked)
        self.page.goto(file.as_uri())

    def asked(self, request: Any) -> None:
        if request.url != self.page.url and not request.url.startswith("file:"):
            self.wrong.append(request.url)


@pytest.fixture(params=WIDTHS, ids=lambda width: f"{width}px")
def opened(request: pytest.FixtureRequest, chromium: Any, file: Path) -> Iterator[Any]:
    found = Open(chromium, file, request.param)
    yield found.page
    assert found.wrong == []
    found.context.close()


@pytest.fixture
def wide(chromium: Any, file: Path) -> Iterator[Any]:
    found = Open(chromium, file, WIDTHS[0])
    yield found.page
    assert found.wrong == []
    found.context.close()


def figure(page: Any, name: str) -> Any:
    """The figure, once it is drawn."""
    found = page.locator(f"#{name}")
    found.scroll_into_view_if_needed()
    found.locator("svg").first.wait_for()
    return found


def marks(found: Any, arm: int) -> int:
    """How many marks of the arm can be seen."""
    return found.locator(f'g[data-arm="{arm}"]:not(.hidden)').count()


def ticks(found: Any) -> list[str]:
    return (
        found.locator("svg").first.locator("text:not(.label)").all_inner_texts()
        or found.locator("svg").first.locator("text:not(.label)").all_text_contents()
    )


def test_every_figure_draws_without_a_word_on_the_console(opened: Any) -> None:
    for tab in opened.locator('#run_0 [role="tab"]').all():
        tab.click()
        panel = opened.locator(f"#{tab.get_attribute('aria-controls')}")
        assert panel.is_visible() and panel.locator("svg g[data-kind]").count() > 0
    for name in ("verdict", "frontier", "probing"):
        assert figure(opened, f"run_0-{name}").locator("g[data-kind]").count() > 3


def test_nothing_is_wider_than_the_screen(opened: Any) -> None:
    for name in ("run_0-frontier", "run_1-probing", "browser", "attempts"):
        opened.locator(f"#{name}").scroll_into_view_if_needed()
        opened.wait_for_timeout(100)
    for details in opened.locator("details").all():
        details.evaluate("node => { node.open = true; }")
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert opened.evaluate("document.body.scrollWidth <= innerWidth")


def test_no_word_lies_on_the_sentence_next_to_it(opened: Any) -> None:
    """Each answer is tried with every word that the page counts at its top."""
    overlap = """([answer, words]) => words.filter(word => {
        answer.querySelector(".badge").innerHTML = word
        const [badge, sentence] = [".badge", ".said"].map(
            name => answer.querySelector(name).getBoundingClientRect())
        return badge.right > sentence.left && badge.bottom > sentence.top
    })"""
    words = opened.locator(".counts .badge").evaluate_all("all => all.map(one => one.innerHTML)")
    assert len(words) == 5
    for details in opened.locator("#answers details").all():
        details.evaluate("node => { node.open = true; }")
    answers = opened.locator(".answer:has(.said)").element_handles()
    assert len(answers) > 3
    for answer in answers:
        assert opened.evaluate(overlap, [answer, words]) == []


def test_verdicts_scroll_by_keyboard_and_say_what_their_words_mean(opened: Any) -> None:
    box = opened.get_by_role("region", name="Verdicts of run_0")
    box.scroll_into_view_if_needed()
    terms = opened.locator(f"#{box.get_attribute('aria-describedby')}")
    said = terms.text_content()
    assert terms.is_visible() and terms.bounding_box()["y"] > box.bounding_box()["y"]
    for word in ("Smallest effect of interest", "Detectable", "Seeds to tell"):
        assert word in said, word
    attached = box.evaluate("node => getComputedStyle(node).backgroundAttachment")
    assert attached == "local, local, scroll, scroll"  # the shadow stays, its cover scrolls away
    hidden = box.evaluate("node => node.scrollWidth - node.clientWidth")
    assert hidden > 100 or opened.viewport_size["width"] > 1000
    box.focus()
    opened.keyboard.press("ArrowRight")
    opened.wait_for_timeout(400)
    assert (box.evaluate("node => node.scrollLeft") > 0) == (hidden > 0)


def test_an_arm_is_hidden_in_all_figures_of_its_run_and_in_no_other(wide: Any) -> None:
    frontier, other = figure(wide, "run_0-frontier"), figure(wide, "run_1-frontier")
    before, elsewhere = marks(frontier, 1), marks(other, 1)
    button = wide.locator('.legend[data-run="run_0"] button[data-arm="1"]')
    assert before > 0 and button.get_attribute("aria-pressed") == "true"
    button.click()
    assert marks(frontier, 1) == 0 and button.get_attribute("aria-pressed") == "false"
    assert marks(figure(wide, "run_0-probing"), 1) == 0  # also where it is drawn later
    assert marks(frontier, 0) > 0 and marks(other, 1) == elsewhere
    assert "arms and controls are shown" in wide.locator("#told").text_content()
    wide.locator('.legend[data-run="run_0"] button.all').click()
    assert marks(frontier, 1) == before


def test_hover_says_arm_and_values(wide: Any) -> None:
    found = figure(wide, "run_0-verdict")
    point = found.locator('g[data-arm="1"][data-kind="line"] path').first
    box = point.bounding_box()
    wide.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tip = wide.locator("#tip")
    assert tip.is_visible() and "A1 core" in tip.text_content()
    assert "minus" in tip.text_content()


def test_dragging_zooms_and_show_all_goes_back(wide: Any) -> None:
    found = figure(wide, "run_0-frontier")
    svg = found.locator("svg").first
    svg.scroll_into_view_if_needed()
    home, box = ticks(found), svg.bounding_box()
    wide.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 0.3 * box["height"])
    wide.mouse.down()
    wide.mouse.move(box["x"] + 0.8 * box["width"], box["y"] + 0.6 * box["height"], steps=4)
    wide.mouse.up()
    assert ticks(found) != home
    found.get_by_role("button", name="Show all").first.click()
    assert ticks(found) == home


def test_figures_work_by_keyboard_alone(wide: Any) -> None:
    found = figure(wide, "run_0-frontier")
    svg, told = found.locator("svg").first, wide.locator("#told")
    svg.focus()
    home = ticks(found)
    wide.keyboard.press("ArrowRight")
    first = told.text_content()
    assert "baseline" in first and "FVU" in first and wide.locator("#tip").is_visible()
    wide.keyboard.press("ArrowRight")
    assert told.text_content() != first
    wide.keyboard.press("ArrowDown")
    assert "A1 core" in told.text_content()
    wide.keyboard.press("+")
    assert ticks(found) != home
    wide.keyboard.press("0")
    assert ticks(found) == home
    button = wide.locator('.legend[data-run="run_0"] button[data-arm="1"]')
    button.focus()
    wide.keyboard.press("Space")
    assert marks(found, 1) == 0


def test_the_way_through_the_page_by_tab_begins_at_the_skip_link(wide: Any) -> None:
    wide.keyboard.press("Tab")
    assert wide.evaluate("document.activeElement.className") == "skip"
    wide.keyboard.press("Enter")
    assert wide.evaluate("document.activeElement.id") == "content"
    tabs = wide.locator('#run_0 [role="tab"]')
    tabs.first.focus()
    wide.keyboard.press("ArrowRight")
    assert tabs.nth(1).get_attribute("aria-selected") == "true"
    assert wide.evaluate("document.activeElement.id") == tabs.nth(1).get_attribute("id")
    assert wide.locator(f"#{tabs.nth(1).get_attribute('aria-controls')}").is_visible()


def latents(page: Any) -> list[int]:
    return [int(text) for text in page.locator("#list button").evaluate_all(
        "nodes => nodes.map((node) => node.dataset.latent)")]  # fmt: skip


@pytest.mark.parametrize("motion", ["no-preference", "reduce"])
def test_a_link_at_the_top_leads_to_its_section(chromium: Any, file: Path, motion: str) -> None:
    """Figures are drawn, and grow, only when they come near."""
    for width in WIDTHS:
        for section in ("latents", "run_1", "attempts", "answers"):
            found = Open(chromium, file, width, reduced_motion=motion)
            link = found.page.locator(f'nav a[href="#{section}"]')
            link.click()
            found.page.wait_for_timeout(1500)
            place = found.page.locator(f"#{section}").bounding_box()
            end = found.page.evaluate("scrollY + innerHeight >= document.body.scrollHeight - 2")
            assert 0 <= place["y"] < 200 or end, (width, section, place)
            here = found.page.locator(".top nav [aria-current]").bounding_box()
            bar = found.page.locator(".top nav").bounding_box()
            assert bar["x"] - 1 <= here["x"] < bar["x"] + bar["width"], (width, section)
            assert found.wrong == []
            found.context.close()


def test_latents_are_searched_filtered_and_sorted(opened: Any) -> None:
    page = opened
    assert len(latents(page)) == 200
    page.fill("#search", "#17")
    assert latents(page) == [17] and "1 of 200" in page.locator("#found").text_content()
    assert page.locator("#latent h3").text_content().startswith("Latent 17")
    page.fill("#search", "no such word")
    assert latents(page) == [] and "No latent" in page.locator("#latent").text_content()
    page.fill("#search", "")
    page.select_option("#group", label="rarest")
    assert latents(page) == list(range(50, 100))
    page.select_option("#group", label="all")
    page.select_option("#sort", "density")
    assert latents(page) == list(range(199, -1, -1))
    page.check("#rising")
    assert latents(page) == list(range(200))
    page.uncheck("#rising")
    page.select_option("#sort", "loss")
    assert latents(page) == list(range(200))


def test_a_latent_shows_all_that_is_known_of_it(wide: Any) -> None:
    wide.fill("#search", "#5")
    shown = wide.locator("#latent")
    said = shown.text_content()
    for part in ("0.6%", "1.95%", "born at step", "50 of 977", "resampled", "#6, cosine 0.5"):
        assert part in said, part
    assert shown.locator(".examples li").count() == 8
    assert shown.locator("mark.peak").count() == 8
    shown.get_by_role("button", name="#6, cosine 0.5").click()
    assert shown.locator("h3").text_content().startswith("Latent 6")
    wide.select_option("#cell", index=1)
    said = shown.text_content()
    assert "No logit lens: the model has no language-model head" in said
    assert "No lifetime: this SAE has no part" in said


def test_latents_work_by_keyboard_alone(wide: Any) -> None:
    wide.keyboard.press("/")
    assert wide.evaluate("document.activeElement.id") == "search"
    wide.locator("#list button").first.focus()
    wide.keyboard.press("ArrowDown")
    assert wide.locator("#latent h3").text_content().startswith("Latent 1 ")
    wide.keyboard.press("End")
    assert wide.locator("#latent h3").text_content().startswith("Latent 199")


def test_markup_in_names_and_texts_stays_text(opened: Any) -> None:
    opened.fill("#search", "<script>")
    assert latents(opened)
    texts = opened.locator("#latent .text").all_text_contents()
    assert any(HOSTILE in text for text in texts)
    assert opened.locator("#latent script").count() == 0
    assert opened.title() == "made-up – saelab report"
    assert HOSTILE_ARM in opened.locator('.legend[data-run="run_0"]').text_content()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_readers_scheme_is_taken_and_can_be_changed(
    chromium: Any, file: Path, scheme: str
) -> None:
    found = Open(chromium, file, 1280, color_scheme=scheme)
    page = found.page

    def contrast() -> float:
        """WCAG contrast of text and background."""
        colors = page.evaluate(
            "() => { const s = getComputedStyle(document.body);"
            " return [s.color, s.backgroundColor].map((c) => c.match(/\\d+/g).map(Number)); }"
        )
        lights = []
        for color in colors:
            parts = [v / 255 for v in color[:3]]
            parts = [v / 12.92 if v <= 0.04 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
            lights.append(0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2])
        return (max(lights) + 0.05) / (min(lights) + 0.05)

    def background() -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    before = background()
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    assert contrast() > 7
    page.locator("#theme").click()
    assert background() != before and contrast() > 7
    assert found.wrong == []
    found.context.close()


def test_the_page_is_small(file: Path) -> None:
    assert file.stat().st_size < LIMIT
