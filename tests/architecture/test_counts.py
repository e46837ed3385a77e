"""No message says '1 cells': numbers stand with their nouns by `runtime.counting.count`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import saelab
from saelab.runtime.counting import count

ROOT = Path(saelab.__file__).parent
NOUNS = (
    *("cell", "run", "seed", "pair", "arm", "worker", "latent", "row", "token", "text", "context"),
    *("step", "file", "shard", "rank", "SAE", "level", "position", "value", "layer", "prompt"),
)
#: A plural that follows a value at once, as in f"{n} cells".
PLURAL = re.compile(rf" (?:{'|'.join(NOUNS)})s\b(?!/s)")
#: A total that another number stands before may be plural: '1 of 8 seeds', '3/39 cells'.
OF_TOTAL = re.compile(r"(?: of |/|at most |at least |as many as )$")


def unguarded(text: str) -> Iterator[str]:
    """Yields the f-strings of a module in which a bare number comes before a plural."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.JoinedStr):
            continue
        before = ""
        for part, after in zip(node.values, [*node.values[1:], None], strict=True):
            if (
                isinstance(part, ast.FormattedValue)
                and isinstance(after, ast.Constant)
                and PLURAL.match(str(after.value))
                and not OF_TOTAL.search(before)
                and not ast.unparse(part.value).isupper()  # a constant above 1
            ):
                yield ast.unparse(node)
            before = str(part.value) if isinstance(part, ast.Constant) else ""


#: Values that are words, or sizes that are far above 1.
ALLOWED = (
    *("{side} texts", "({name} tokens)", "tokens in contexts of", "{self.n_layers} layers"),
    *("A causal language model", "with its 95% t interval; dots:", "texts a task"),
    "({stop} positions)",
)
MODULES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(ROOT)))
def test_numbers_agree_with_their_nouns(file: Path) -> None:
    found = unguarded(file.read_text(encoding="utf-8"))
    assert not [text for text in found if not any(words in text for words in ALLOWED)]


def test_the_rule_finds_them() -> None:
    bad = 'a = f"{n} cells"; b = f"in {len(x):,} runs, {k} tokens"'
    good = 'a = f"{n} of {k} cells"; b = f"{x} tokens/s"; c = f"{MOST} seeds"; d = f"{n} cellsar"'
    assert len(list(unguarded(bad))) == 3 and not list(unguarded(good))


def test_count() -> None:
    assert [count(n, "cell") for n in (0, 1, 2)] == ["0 cells", "1 cell", "2 cells"]
    assert count(19_508_736, "token") == "19,508,736 tokens"
    assert [count(n, "class", "classes") for n in (1, 3)] == ["1 class", "3 classes"]
