"""Links of all pages lead to files and headings of the repository; the site's navigation is whole.

`make docs` checks the links of the site itself, where pages outside docs/ lie elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from projects import ROOT

DOCS = ROOT / "docs"
OUTSIDE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")
PAGES = {
    p.relative_to(ROOT).as_posix(): p for p in (*DOCS.rglob("*.md"), *map(ROOT.joinpath, OUTSIDE))
}
LINK = re.compile(r"\[[^\[\]]*\]\(([^()\s]+)\)")
FENCED = re.compile(r"^```.*?^```", re.M | re.S)


def text_of(page: Path) -> str:
    """Returns a page without its blocks of code."""
    return FENCED.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub and the site make them."""
    seen: dict[str, int] = {}
    names = set()
    for heading in re.findall(r"^#+ +(.*)$", text_of(page), re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", heading).strip().lower()
        name = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        names.add(f"{name}-{seen[name]}" if seen.get(name) else name)
        seen[name] = seen.get(name, 0) + 1
    return names


def broken(name: str) -> Iterator[str]:
    """Yields the links of a page that lead nowhere."""
    page = PAGES[name]
    for target in LINK.findall(text_of(page)):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = (page.parent / path).resolve() if path else page
        whole = file / "README.md" if file.is_dir() and (file / "README.md").is_file() else file
        if not whole.exists() or (anchor and anchor not in anchors(whole)):
            yield target


@pytest.mark.parametrize("name", sorted(PAGES))
def test_links_lead_somewhere(name: str) -> None:
    assert not list(broken(name))


def test_what_leads_nowhere_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A `b`: c\n\n[x](page.md#a-b-c) [y](page.md#d) [z](gone.md) [w](http://a)\n")
    monkeypatch.setitem(PAGES, "page.md", page)
    assert list(broken("page.md")) == ["page.md#d", "gone.md"]


def places(entry: object) -> Iterator[str]:
    """Yields the pages of a navigation."""
    if isinstance(entry, str):
        yield entry
    for inner in (
        entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ()
    ):
        yield from places(inner)


def test_every_page_is_in_the_navigation_once() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = sorted(places(config["nav"]))
    inside = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    inside |= {f"notebooks/{file.stem}.md" for file in (DOCS / "notebooks").glob("*.ipynb")}
    assert listed == sorted(inside | {f"project/{name}" for name in OUTSIDE})


@pytest.mark.parametrize(
    ("index", "folder"), [("README.md", "."), ("decisions/README.md", "decisions")]
)
def test_an_index_has_every_page_of_its_folder(index: str, folder: str) -> None:
    page = DOCS / index
    linked = {(page.parent / target).resolve() for target in LINK.findall(text_of(page))}
    pages = {file.resolve() for file in (DOCS / folder).glob("*.md")} - {page.resolve()}
    assert pages and not pages - linked
