"""Data of the feature browser: latents of chosen cells, small enough for a page.

Tokens of the held-out text are stored once for all cells, as pieces of contexts that examples refer
to; a token is an index into the page's list of strings. Activations are in percent of the latent's
largest, and only those that are not 0 are stored:

    example = [context, start, tokens shown, place of the strongest, [place, percent, ...]]
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from saelab.analysis.latents import Browsed, HeldOut, Latent
from saelab.evals.latent_examples import GROUPS, Example, Lens


class _Texts:
    """Tokens of one held-out text: distinct strings, and the pieces that are shown."""

    def __init__(self, data: HeldOut) -> None:
        self.data = data
        self._number: dict[str, int] = {}
        self._spans: dict[int, list[tuple[int, int]]] = {}

    @property
    def strings(self) -> list[str]:
        """Distinct strings, in the order of their numbers."""
        return list(self._number)

    def number(self, text: str) -> int:
        """Index into `strings` of a token's text, which is added where it is new."""
        return self._number.setdefault(text, len(self._number))

    def number_token(self, token: int) -> int:
        """Index into `strings` of a token, given its id in the model's vocabulary."""
        return self.number(self.data.token(token))

    def show(self, example: Example) -> None:
        span = (example.start, example.start + len(example.values))
        self._spans.setdefault(example.context, []).append(span)

    def pieces(self) -> dict[str, list[Any]]:
        """Context -> [start, token numbers] of pieces that do not touch."""
        pieces: dict[str, list[Any]] = {}
        for context, spans in sorted(self._spans.items()):
            words = self.data.words(context) if self.data.ids(context) else []
            if words:
                pieces[str(context)] = [
                    [start, [self.number(word) for word in words[start:stop]]]
                    for start, stop in _join_spans(spans)
                ]
        return pieces


def _join_spans(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Joins spans [start, stop) that meet or overlap; returns them ascending."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], stop))
        else:
            joined.append((start, stop))
    return joined


def pack_cells(cells: Sequence[Browsed]) -> dict[str, Any]:
    """Plain data for the page: the texts, and cells that name theirs by its index."""
    texts: dict[str, _Texts] = {}
    packed = []
    for cell in cells:
        text = texts.setdefault(cell.texts.key, _Texts(cell.texts))
        packed.append(_cell(cell, text, list(texts).index(cell.texts.key)))
    pieces = [text.pieces() for text in texts.values()]  # before the strings, which they add to
    return {
        "groups": list(GROUPS),
        "texts": [
            {"strings": text.strings, "pieces": of_text}
            for text, of_text in zip(texts.values(), pieces, strict=True)
        ],
        "cells": packed,
    }


def _cell(cell: Browsed, texts: _Texts, text: int) -> dict[str, Any]:
    return {
        "run": cell.run,
        **cell.id.as_dict(),
        "d_sae": cell.d_sae,
        "tokens": cell.tokens,
        "steps": cell.steps,
        "why_no_lens": cell.why_no_lens,
        "why_no_text": cell.why_no_text,
        "why_no_life": cell.why_no_life,
        "text": text,
        "latents": [_latent(latent, texts) for latent in cell.latents],
    }


def _latent(latent: Latent, texts: _Texts) -> dict[str, Any]:
    for example in latent.examples:
        texts.show(example)
    packed: dict[str, Any] = {
        "i": latent.index,
        "group": GROUPS.index(latent.group),
        "density": _short(latent.density),
        "loss": _short(latent.loss_share),
        "max": _short(latent.largest),
        "examples": [
            _example(example, latent.largest)
            for example in latent.examples
            if all(map(math.isfinite, (*example.values, latent.largest)))
        ],
        "near": [[i, round(cosine, 3)] for i, cosine in latent.neighbours if math.isfinite(cosine)],
    }
    if latent.lens is not None:
        packed |= _lens(latent.lens, texts)
    if latent.life:
        packed["life"] = latent.life
    return packed


def _example(example: Example, largest: float) -> list[Any]:
    shares = [round(100 * abs(value) / largest) for value in example.values]
    firing = [
        number
        for place, (value, share) in enumerate(zip(example.values, shares, strict=True))
        if value
        for number in (place, max(1, share))
    ]
    peak = example.peak - example.start
    return [example.context, example.start, len(example.values), peak, firing]


def _lens(lens: Lens, texts: _Texts) -> dict[str, Any]:
    return {
        name: [
            [texts.number_token(token), round(value, 2)]
            for token, value in tokens
            if math.isfinite(value)
        ]
        for name, tokens in (("raised", lens.raised), ("lowered", lens.lowered))
    }


def _short(value: float) -> float | None:
    """Rounds a number; None where it is not finite, as in an SAE whose training diverged."""
    return float(f"{value:.3g}") if math.isfinite(value) else None
