"""No tensor takes its type from torch's defaults, which a notebook may have changed."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import saelab

ROOT = Path(saelab.__file__).parent
#: Functions of torch that take the default dtype where none is given.
MAKERS = ("tensor", "zeros", "ones", "empty", "full", "rand", "randn", "eye", "linspace")


def calls_without(file: Path, option: str) -> list[str]:
    """The calls of `MAKERS` and `arange` in a file that leave the option out."""
    makers = MAKERS if option == "dtype" else (*MAKERS, "arange", "randperm")
    return [
        f"{file.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in [f"torch.{name}" for name in makers]
        and option not in [keyword.arg for keyword in node.keywords]
    ]


def test_every_new_tensor_states_its_dtype() -> None:
    assert not [call for file in ROOT.rglob("*.py") for call in calls_without(file, "dtype")]


def test_every_new_tensor_of_the_kernels_states_its_device() -> None:
    files = (ROOT / "kernels").glob("*.py")
    assert not [call for file in files for call in calls_without(file, "device")]


@pytest.mark.parametrize(
    ("code", "option", "count"),
    [
        ("torch.zeros(3)", "dtype", 1),
        ("torch.zeros(3, dtype=torch.int64)", "dtype", 0),
        ("torch.arange(3)", "dtype", 0),
        ("torch.arange(3)", "device", 1),
    ],
)
def test_the_check_sees_what_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, option: str, count: int
) -> None:
    monkeypatch.setattr("test_tensor_types.ROOT", tmp_path)
    file = tmp_path / "code.py"
    file.write_text(code)
    assert len(calls_without(file, option)) == count
