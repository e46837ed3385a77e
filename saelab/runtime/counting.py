"""Numbers of things in messages: '1 cell', '39 cells', '19,508,736 tokens'."""

from __future__ import annotations


def count(n: int, noun: str, plural: str = "") -> str:
    """Returns the number with its noun, which is singular for 1 only.

    Args:
        n: the number; thousands are separated by commas.
        noun: singular, such as 'cell' or 'usable pair'.
        plural: where it is not the singular with an 's'.
    """
    return f"{n:,} {noun if n == 1 else plural or f'{noun}s'}"
