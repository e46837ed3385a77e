"""The embedded probing entries: labels by provenance, honest splits, sizes as promised."""

from __future__ import annotations

import ast
import io
import json
import tokenize
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from saelab.data.probing import embedded, tables
from saelab.data.text.stdlib import Module, is_held_out, modules, path_hash
from saelab.errors import SettingError, SourceError

EXAMPLE = '''"""First line of it.

And the second part.
"""
# A comment that
# goes on.
LIMIT = 10
text = """
# no comment
"""


class Cat(Animal):
    legs = 4

    def __init__(self, name):
        self.name = name

    def _speak(self):
        """Say it."""
        for sound in self.sounds:
            print(sound)
        if self.name:
            return self.name + "!"


def walk(cat, far):
    steps = 0
    steps += 1
    try:
        cat.go("far away", far)
    except OSError:
        pass
    return steps
'''


def cut(function: object, text: str = EXAMPLE, path: str = "example.py") -> list[tuple[str, str]]:
    return sorted(function(embedded.ParsedModule(Module(path, text))))  # type: ignore[operator]


def test_prose_is_cut_without_its_marks() -> None:
    assert cut(embedded.cut_prose) == [
        ("comment", "A comment that\ngoes on."),
        ("detail", "And the second part."),
        ("message", "far away"),
        ("summary", "First line of it."),
        ("summary", "Say it."),
    ]


def test_expressions_are_labelled_by_their_role() -> None:
    assert cut(embedded.cut_expression_role) == [
        ("argument", '"far away"'),
        ("argument", "far"),
        ("argument", "sound"),
        ("condition", "self.name"),
        ("returned", 'self.name + "!"'),
        ("returned", "steps"),
    ]


def test_assignments_are_labelled_by_their_place() -> None:
    assert cut(embedded.cut_assignment_scope) == [
        ("constructor", "self.name = name"),
        ("function", "steps += 1"),
        ("function", "steps = 0"),
        ("module", "LIMIT = 10"),
        ("module", 'text = """\n# no comment\n"""'),
    ]


def test_blocks_are_bodies_without_their_head() -> None:
    assert cut(embedded.cut_block) == [
        ("branch", 'return self.name + "!"'),
        ("guarded", 'cat.go("far away", far)'),
        ("loop", "print(sound)"),
    ]


def test_bodies_are_labelled_by_the_kind_of_name() -> None:
    found = dict(cut(embedded.cut_function_name))
    assert found["special"] == "self.name = name"
    assert found["private"].startswith("for sound in self.sounds:\n    print(sound)\nif self.name:")
    assert found["public"].startswith("steps = 0") and "def" not in found["public"]


def test_function_parts_do_not_overlap() -> None:
    assert cut(embedded.cut_function_part) == [
        ("closing", 'try:\n    cat.go("far away", far)\nexcept OSError:\n    pass\nreturn steps'),
        ("opening", "steps = 0\nsteps += 1"),
    ]


def test_themes_come_from_the_package_alone() -> None:
    text = "".join(f"value_{i} = {i}  # the same words everywhere\n" for i in range(12))
    gui = cut(embedded.cut_theme, text, "tkinter/x.py")
    network = cut(embedded.cut_theme, text, "email/x.py")
    assert {theme for theme, _ in gui} == {"gui"} and {theme for theme, _ in network} == {"network"}
    assert [window for _, window in gui] == [window for _, window in network]
    assert cut(embedded.cut_theme, text, "datetime.py") == []


def some_modules() -> list[Module]:
    return [m for m in modules() if m.held_out][::20]


def test_source_text_agrees_with_ast() -> None:
    compared = 0
    for module in some_modules():
        source = embedded.ParsedModule(module)
        for node in [*source.all(ast.Return, ast.Assign, ast.If)][:60]:
            segment = ast.get_source_segment(module.text, node)
            assert segment is not None
            lines = source.text(node).split("\n")
            # only leading blanks may differ
            assert [s.lstrip() for s in lines] == [s.lstrip() for s in segment.split("\n")]
            compared += 1
    assert compared > 200


def test_comments_are_those_of_tokenize() -> None:
    compared = 0
    for module in some_modules():
        wanted = []
        for token in tokenize.generate_tokens(io.StringIO(module.text).readline):
            if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
                wanted.append(token.string.lstrip("#! ").rstrip("#-=* "))
        source = embedded.ParsedModule(module)
        found = [text for kind, text in embedded.cut_prose(source) if kind == "comment"]
        lines = [line for text in found for line in text.split("\n")]
        # comments between the parts of a string that goes over lines are left out
        assert set(lines) <= set(wanted)
        assert len(lines) >= 0.9 * len(wanted)
        compared += len(lines)
    assert compared > 200


# ---------------------------------------------------------------- the entries


def test_every_class_has_what_is_promised() -> None:
    entries = embedded.embedded_entries()
    assert len(entries) >= 6
    assert {e.name for e in entries} | set(embedded.missing_entries()) == {
        r.name for r in embedded.EMBEDDED_RECIPES
    }
    for entry in entries:
        assert tuple(entry.train) == tuple(entry.test) == entry.classes
        for name in entry.classes:
            assert len(entry.train[name]) == 500
            assert embedded.MIN_TEST <= len(entry.test[name]) <= 250


def test_no_text_occurs_twice_and_all_are_short() -> None:
    for entry in embedded.embedded_entries():
        texts = [t for side in (entry.train, entry.test) for group in side.values() for t in group]
        assert len(texts) == len(set(texts))
        assert all(t == t.strip() and 12 <= len(t) <= embedded.CHARACTERS for t in texts)


def test_fewer_texts_are_a_prefix() -> None:
    for small, full in zip(
        embedded.embedded_entries(20, 10), embedded.embedded_entries(), strict=True
    ):
        for name in full.classes:
            assert small.train[name] == full.train[name][:20]
            assert small.test[name] == full.test[name][:10]


def test_entries_are_the_same_every_time() -> None:
    first = embedded.entries_digest(embedded.embedded_entries())
    embedded._candidates.cache_clear()
    embedded._entries.cache_clear()
    again = embedded.embedded_entries()
    assert embedded.entries_digest(again) == first
    changed = replace(again[0], train={**again[0].train, again[0].classes[0]: ("another text",)})
    assert embedded.entries_digest((changed, *again[1:])) != first


@pytest.fixture
def small_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Three modules: trained on, held out for train, held out for test; kind -> its marker."""
    kinds: dict[str, str] = {}
    found = []
    for i in range(1000):
        path = f"tkinter/part{i}.py"
        held_out, test = is_held_out(path), path_hash(path, "probing") % embedded.TEST_EVERY == 0
        kind = ("test" if test else "train") if held_out else "seen"
        if kind not in kinds:
            kinds[kind] = marker = f"marker_{kind}"
            body = f'def {marker}():\n    return "the result of {marker} only"\n'
            shared = "def shared():\n    return [everything, that, both, share]\n"
            found.append(Module(path, body + shared))
    monkeypatch.setattr(embedded, "modules", lambda: tuple(found))
    embedded._candidates.cache_clear()
    embedded._entries.cache_clear()
    yield kinds
    embedded._candidates.cache_clear()
    embedded._entries.cache_clear()


def test_only_held_out_files_and_each_on_one_side(small_library: dict[str, str]) -> None:
    assert set(small_library) == {"seen", "train", "test"}
    groups = embedded._candidates()["expression_role"]
    assert list(groups["returned", False]) == ['"the result of marker_train only"']
    assert list(groups["returned", True]) == ['"the result of marker_test only"']


def test_a_small_library_leaves_entries_out_with_a_reason(small_library: dict[str, str]) -> None:
    assert embedded.embedded_entries() == ()
    reasons = embedded.missing_entries()
    assert set(reasons) == {recipe.name for recipe in embedded.EMBEDDED_RECIPES}
    assert reasons["expression_role"] == "class 'condition' has 0 train texts, 500 are needed"


def test_shared_texts_are_dropped_everywhere() -> None:
    groups = {"a": {"x": None, "both": None}, "b": {"both": None, "y": None}}
    embedded.drop_shared(groups)
    assert groups == {"a": {"x": None}, "b": {"y": None}}


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(SettingError, match="train_size = 0"):
        embedded.embedded_entries(train_size=0)


# ---------------------------------------------------------------- local tables


def write_table(folder: Path, side: str, rows: list[dict[str, object]], kind: str) -> None:
    if kind == "jsonl":
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{side}.jsonl").write_text(lines)
    else:
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{side}.parquet")


def rows_of(side: str, n: int) -> list[dict[str, object]]:
    return [
        {"text": f"{side} {label} {i}", "label": label} for label in (0, 1, 2) for i in range(n)
    ]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_local_table_becomes_an_entry(tmp_path: Path, kind: str) -> None:
    both = {"text": "on both sides", "label": 1}
    write_table(tmp_path, "train", [*rows_of("train", 8), both], kind)
    write_table(tmp_path, "test", [*rows_of("test", 5), both], kind)
    entry = tables.entries_from_table("mine", tmp_path, train_size=8, test_size=4)
    assert entry.classes == ("0", "1", "2")
    for name in entry.classes:
        assert set(entry.train[name]) == {f"train {name} {i}" for i in range(8)}
        assert len(set(entry.test[name])) == 4
        assert all(text.startswith(f"test {name} ") for text in entry.test[name])
    assert entry == tables.entries_from_table("mine", tmp_path, train_size=8, test_size=4)
    other = tables.entries_from_table("mine", tmp_path, train_size=8, test_size=4, seed=1)
    assert other.train != entry.train


def test_unusable_tables_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="has no train.parquet or train.jsonl"):
        tables.entries_from_table("mine", tmp_path)
    (tmp_path / "train.jsonl").write_text("no json\n")
    with pytest.raises(SourceError, match="can't be read"):
        tables.entries_from_table("mine", tmp_path)
    write_table(tmp_path, "train", rows_of("train", 8), "parquet")
    write_table(tmp_path, "test", rows_of("test", 5)[:10], "parquet")
    with pytest.raises(SourceError, match="choose one of text, label"):
        tables.entries_from_table("mine", tmp_path, text_column="body")
    with pytest.raises(SourceError, match="both need the same"):
        tables.entries_from_table("mine", tmp_path)
    write_table(tmp_path, "test", rows_of("test", 5), "parquet")
    with pytest.raises(SettingError, match="test_size = 6: choose 1 to 5"):
        tables.entries_from_table("mine", tmp_path, train_size=8, test_size=6)


def test_ag_news_becomes_an_entry(real_data: Path) -> None:
    folder = real_data / "texts" / "ag_news"
    entry = tables.entries_from_table("ag_news", folder, train_size=300, test_size=100)
    assert entry.classes == ("0", "1", "2", "3")
    assert all(len(entry.train[c]) == 300 and len(entry.test[c]) == 100 for c in entry.classes)
