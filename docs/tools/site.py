"""Hooks of MkDocs: pages of the repository outside docs/, and links between all of them.

Links in the pages are those of the repository, where they work as they stand. On the site the pages
outside docs/ that it shows lie under project/, and links to them are rewritten. A link to another
file of the repository, which the site does not have, becomes its name as code.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files
from pymdownx.slugs import slugify

log = get_plugin_logger("site")
ROOT = Path(__file__).parents[2]
#: Pages of the repository outside docs/ that the site shows.
OUTSIDE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")
LINK = re.compile(r"(!?)\[([^\[\]]*(?:\[[^\[\]]*\][^\[\]]*)*)\]\(([^()\s]+)\)")
#: Scripts, pictures and style sheets of other hosts.
LOADED = re.compile(r'(?:src=|<link rel="stylesheet" href=)"(https?:[^"]+)"')
FENCED = re.compile(r"^```.*?^```", re.M | re.S)


def on_config(config: Any) -> None:
    """Gives headings the anchors that they have on GitHub."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = slugify(case="lower")


def on_files(files: Files, *, config: Any) -> None:
    """Adds the pages outside docs/, and a page for each notebook."""
    for place in OUTSIDE:
        file = File.generated(config, f"project/{place}", abs_src_path=str(ROOT / place))
        files.append(file)
    for notebook in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        place = f"notebooks/{notebook.stem}.md"
        files.append(File.generated(config, place, content=page_of(notebook)))


def page_of(notebook: Path) -> str:
    """Returns the cells of a notebook as Markdown, with the outputs that it is stored with."""
    pieces = []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        code = cell["cell_type"] == "code"
        pieces.append(f"```python\n{source}\n```" if code else source)
        for output in cell.get("outputs", ()):
            data = output.get("data", {"text/plain": output.get("text", "")})
            if "image/png" in data:
                image = "".join(data["image/png"]).replace("\n", "")
                pieces.append(f'<img alt="" src="data:image/png;base64,{image}">')
            else:
                pieces.append(f"```text\n{''.join(data['text/plain']).rstrip()}\n```")
    return "\n\n".join(pieces)


def on_page_markdown(markdown: str, *, page: Any, files: Files, **_: Any) -> str:
    """Rewrites the links of a page to what the site has."""
    here = repository_place(page.file.src_uri)

    def rewritten(match: re.Match[str]) -> str:
        if any(start <= match.start() < end for start, end in codes):
            return match[0]
        mark, text, target = match.groups()
        path, sign, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:", path):
            return match[0]
        place = posixpath.normpath(posixpath.join(posixpath.dirname(here), path))
        place = f"{place}/README.md" if (ROOT / place).is_dir() else place
        if not (ROOT / place).is_file():
            return match[0]  # MkDocs warns of it
        on_site = site_place(place)
        if files.get_file_from_path(on_site) is None:
            return f"`{text.strip('`')}`"
        way = posixpath.relpath(on_site, posixpath.dirname(page.file.src_uri) or ".")
        return f"{mark}[{text}]({way}{sign}{anchor})"

    codes = [match.span() for match in FENCED.finditer(markdown)]
    return LINK.sub(rewritten, markdown)


def on_post_page(output: str, *, page: Any, **_: Any) -> None:
    """Warns of what a page would load from elsewhere; links may lead there."""
    for loaded in LOADED.findall(output):
        log.warning("%s loads %s from elsewhere", page.file.src_uri, loaded)


def repository_place(src_uri: str) -> str:
    """Returns the path in the repository of a page of the site."""
    outside = src_uri.removeprefix("project/")
    return outside if outside != src_uri else f"docs/{src_uri}"


def site_place(path: str) -> str:
    """Returns the path on the site of a file of the repository."""
    inside = path.removeprefix("docs/")
    page = re.sub(r"^(notebooks/.*)\.ipynb$", r"\1.md", inside)
    return page if inside != path else f"project/{path}"
