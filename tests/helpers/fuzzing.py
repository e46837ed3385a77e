"""Harm done to files, and what a reader may answer: what it was, or one sentence.

`cases` says how many; SAELAB_FUZZ multiplies it for runs by hand.
"""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from saelab.errors import SaelabError
from saelab.runtime.safe_text import is_plain

#: More memory than this for one damaged file is a fault, in bytes.
MOST = 10**9
TIMES = int(os.environ.get("SAELAB_FUZZ", "1"))

LARGE = (0, 1, 2, 7, 8, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
PLACES = ("..", "../..", "/etc/passwd", "../../../../tmp/out", "a/../../b", "c:\\x", "a\x00b", "")
TEXTS = ("\x1b[2J", "\u202egnp.exe", "$\\frac", "<b>|`", "x" * 5000, "\ud800", "__class__", *PLACES)
plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([*LARGE, *(-n for n in LARGE), 10**400, 1e308, -1e308, 5e-324, -0.0]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
    st.sampled_from(TEXTS),
    st.just([]),
    st.just({}),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=4), st.none() | st.integers(), max_size=2),
)


def profile(cases: int) -> settings:
    """So many cases, the same ones each time; by hand, others and more."""
    return settings(
        max_examples=cases * TIMES,
        derandomize=TIMES == 1,
        deadline=None,
        database=None,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def harm(draw: st.DrawFn, good: bytes, text: bool = False) -> bytes:
    """A damaged copy: bits flipped, bytes overwritten, cut, doubled, or nothing that it was."""
    kind = draw(st.sampled_from(("flip", "flip", "number", "cut", "grow", "splice", "random")))
    size = len(good)
    if kind == "random" or not size:
        return draw(st.binary(max_size=200))
    at = st.integers(0, size - 1)
    early = st.integers(0, min(size - 1, 2000))  # headers lie at either end
    where = st.one_of(at, early, early.map(lambda i: size - 1 - i))
    found = bytearray(good)
    if kind == "flip":
        for i in draw(st.lists(where, min_size=1, max_size=8)):
            found[i] ^= 1 << draw(st.integers(0, 7))
    elif kind == "number":
        i, width = draw(where), draw(st.sampled_from((1, 2, 4, 8)))
        value = draw(st.sampled_from(LARGE)) % 2 ** (8 * width)
        found[i : i + width] = value.to_bytes(width, "little")[: size - i]
    elif kind == "cut":
        del found[draw(where) :]
    elif kind == "grow":
        found += draw(st.binary(min_size=1, max_size=50))
    else:
        i, j, k = draw(where), draw(where), draw(where)
        found[k:k] = found[min(i, j) : max(i, j)]
    return bytes(found)


@st.composite
def other_json(draw: st.DrawFn, good: Any) -> Any:
    """The same data with up to three places of another type, range or name, left out or added."""
    data = json.loads(json.dumps(good))
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(data))
        if not places:
            break
        node, key = draw(st.sampled_from(places))
        kind = draw(st.sampled_from(("set", "set", "set", "drop", "rename")))
        if kind == "drop":
            del node[key]
        elif kind == "rename" and isinstance(node, dict):
            name = draw(st.sampled_from(TEXTS) | st.text(max_size=5))
            node[name.replace("\ud800", "?")] = node.pop(key)
        else:
            node[key] = draw(plain)
    return data


def _places(data: Any) -> Any:
    if isinstance(data, dict):
        for key in list(data):
            yield data, key
            yield from _places(data[key])
    elif isinstance(data, list):
        for i in range(len(data)):
            yield data, i
            yield from _places(data[i])


def as_toml(data: Any) -> bytes:
    """TOML of data from `other_json`, as inline tables; what TOML has no word for is left as JSON
    has it, and then is no TOML."""
    lines = (f"{_toml_key(key)} = {_toml(value)}" for key, value in data.items())
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{_toml_key(k)} = {_toml(v)}' for k, v in value.items())} }}"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value, ensure_ascii=isinstance(value, str) and not value.isprintable())


def _toml_key(key: str) -> str:
    return json.dumps(key, ensure_ascii=False)


def as_json(data: Any) -> bytes:
    return json.dumps(data).encode()


def answer(read: Callable[[], Any]) -> tuple[str, str]:
    """("value", what was read) or ("told", the sentence); anything else is a fault.

    Raises: what the reader raises that is no SaelabError; AssertionError for too much memory or a
        sentence that is none.
    """
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        result = ("value", repr(read()))  # as text, in which NaN is NaN
    except SaelabError as error:
        said = str(error)
        assert len(said) > 20 and is_plain(said), said
        result = ("told", said)
    taken = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert taken < MOST, f"{taken:,} bytes for a damaged file"
    return result
