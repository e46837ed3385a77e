"""Latents of finished cells for a feature browser, from the saved SAEs and the held-out text.

Cells are the first seeds of the baseline and of the primary arms at the target L0, or of the arms
that are asked for. Nothing is trained; the held-out activations are taken from the cache or
harvested again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from saelab import formats
from saelab.data.activations.store import FOREIGN_REASON, Source
from saelab.data.language_model import LanguageModel
from saelab.data.text.tokens import decode_token
from saelab.errors import SettingError
from saelab.evals import latent_examples
from saelab.evals.latent_examples import Example, Lens, Survey
from saelab.launch.latent_table import COMMON, FILE
from saelab.launch.prepare import held_out
from saelab.runs.folder import GATE, Member, RunFolder
from saelab.runs.schema import CELLS, CellId
from saelab.sae import SAE
from saelab.storage.parquet import column_types, read_columns
from saelab.study.plan import base_of_run

#: Tokens shown before and after the strongest one. Our choice: two or three lines of code.
BEFORE, AFTER = 16, 8
#: Sign of a decoder for bytes that are no character, and what is shown in its place.
UNDECODED, PART = "\ufffd", "⟨part⟩"
#: Tokens that can hold parts of one character: UTF-8 has up to four bytes, and a token may end one
#: character and begin the next. Our choice: enough for emojis in a row.
MOST_PARTS = 8


@dataclass(frozen=True, kw_only=True)
class Latent:
    """One latent; see `evals/latent_examples` for what its numbers mean.

    Args:
        index, group: its index, and why it was picked.
        largest: its strongest activation on the held-out text.
        lens: None if the model gives none.
        neighbours: other latents and their cosines.
        life: birth and last firing in steps, firings and resamplings, if the SAE recorded them.
    """

    index: int
    group: str
    density: float
    loss_share: float
    largest: float
    examples: list[Example]
    lens: Lens | None
    neighbours: list[tuple[int, float]]
    life: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Browsed:
    """One cell with some of its latents.

    Args:
        run, id: the run and its cell.
        d_sae, tokens: number of all latents, and of the held-out tokens that were encoded.
        latents: in the order of their groups.
        steps: of its training; None if the run does not say.
        why_no_lens, why_no_text, why_no_life: the reason why that is missing; '' if it is there.
        texts: of the examples.
    """

    run: str
    id: CellId
    d_sae: int
    tokens: int
    latents: list[Latent]
    steps: int | None
    why_no_lens: str
    why_no_text: str
    why_no_life: str
    texts: HeldOut


@dataclass(eq=False)
class HeldOut:
    """Held-out activations with their token ids and model."""

    source: Source
    model: LanguageModel | None
    key: str

    def ids(self, context: int) -> list[int]:
        """Returns the token ids of one context; [] if they were not stored."""
        return self._ids[context].tolist() if len(self._ids) else []

    @cached_property
    def _ids(self) -> Tensor:
        """Token ids of all contexts; empty if they were not stored."""
        shards = (self.source.shard(i) for i in range(self.source.n_shards))
        return torch.cat(
            [torch.zeros(0, dtype=torch.float32) if s.ids is None else s.ids for s in shards]
        )

    @property
    def why_no_text(self) -> str:
        return "" if len(self._ids) and self.model is not None else FOREIGN_REASON

    def token(self, token: int) -> str:
        """Decodes a token, with its leading space; `PART` for bytes that are no character."""
        text = self._decode([token])
        return PART if UNDECODED in text else text

    def words(self, context: int) -> list[str]:
        """Decodes each token of a context, so that all of them together are its text.

        A character that is split over several tokens, as emojis often are, is given whole to the
        last of them and the others get ''.
        """
        if context not in self._words:
            self._words[context] = join_characters(self.ids(context), self._decode)
        return self._words[context]

    @cached_property
    def _words(self) -> dict[int, list[str]]:
        return {}

    def _decode(self, tokens: Sequence[int]) -> str:
        assert self.model is not None
        tokenizer = self.model.tokenizer
        if len(tokens) == 1:
            return decode_token(tokenizer, tokens[0])
        return str(tokenizer.decode(list(tokens)))


def join_characters(tokens: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """Decodes tokens one by one, and together where one alone holds only a part of a character.

    Args:
        decode: tokens -> text, with U+FFFD for bytes that are no character.

    Returns: a text for each token; `PART` where no tokens that follow complete the character.
    """
    words: list[str] = []
    while len(words) < len(tokens):
        start = len(words)
        for stop in range(start + 1, min(start + MOST_PARTS, len(tokens)) + 1):
            text = decode(tokens[start:stop])
            if UNDECODED not in text:
                words += [""] * (stop - start - 1) + [text]
                break
        else:
            words.append(PART)
    return words


def primary_arms(run: RunFolder) -> list[str]:
    """Returns the arms that have as many seeds at the target L0 as the baseline.

    Those are the plan's primary arms, or every arm if the plan gives all the same number of seeds.
    """
    seeds: dict[str, int] = {}
    for cell in run.choose():
        seeds[cell.id.arm] = seeds.get(cell.id.arm, 0) + 1
    baseline = run.manifest["baseline"]
    return [arm for arm, n in seeds.items() if arm != baseline and n >= seeds.get(baseline, 0)]


def chosen_cells(
    runs: Sequence[RunFolder], arms: Sequence[str], cells: int
) -> list[tuple[RunFolder, Member]]:
    """Chooses the cells to browse: of each run the first seed of these arms, each content once.

    Args:
        arms: names; () for the baseline, then the primary arms.
        cells: most cells of a run; named arms are never left out.

    Raises: SettingError for an arm that no run has.
    """
    names = dict.fromkeys(cell.id.arm for run in runs for cell in run.choose())
    for arm in arms:
        if arm not in names:
            raise SettingError("--features", arm, f"no run has it; there are {', '.join(names)}")
    chosen: dict[str, tuple[RunFolder, Member]] = {}
    for run in runs:
        wanted = list(arms) or [run.manifest["baseline"], *primary_arms(run)][:cells]
        first = {cell.id.arm: cell for cell in reversed(run.choose())}
        for cell in (first[arm] for arm in wanted if arm in first):
            place = run.manifest["cells"].get(cell.id.name, str(cell.folder))
            chosen.setdefault(place, (run, cell))
    return list(chosen.values())


def browse(
    chosen: Sequence[tuple[RunFolder, Member]], n: int, examples: int, cache: Path
) -> Iterator[Browsed]:
    """Loads each cell and picks latents of it, with texts on which they fire.

    Args:
        n: latents per cell.
        examples: texts per latent.
        cache: folder of harvested activations.
    """
    data: dict[str, HeldOut] = {}
    for run, cell in chosen:
        base = base_of_run(run)
        key = repr((base.model, base.hook_text, base.eval_text, base.context, base.activations))
        key += f"/{base.evaluation.tokens}"
        if key not in data:
            data[key] = HeldOut(*held_out(base, cache), key)
        yield _browsed(run, cell, data[key], n, examples)


def _browsed(run: RunFolder, cell: Member, data: HeldOut, n: int, examples: int) -> Browsed:
    run.check_cells([cell])
    sae = formats.load(cell.folder).sae
    sae = sae.to(torch.device(base_of_run(run).model.device)).eval()
    survey = latent_examples.survey(sae, data.source, examples)
    picked = latent_examples.pick(survey, n, cell.id.seed)
    lives = _lives(run, cell)
    return Browsed(
        run=run.folder.name,
        id=cell.id,
        d_sae=sae.d_sae,
        tokens=survey.tokens,
        latents=describe(sae, data, survey, picked, lives),
        steps=_steps(run, cell),
        why_no_lens=latent_examples.why_no_lens(sae, data.model),
        why_no_text=data.why_no_text,
        why_no_life="" if lives else "this SAE has no part that records lifetimes",
        texts=data,
    )


def describe(
    sae: SAE,
    data: HeldOut,
    survey: Survey,
    picked: dict[int, str],
    lives: dict[str, list[int]],
) -> list[Latent]:
    """Describes latents of an SAE.

    Args:
        sae: in evaluation mode.
        data: that was surveyed.
        picked: latent -> why it was picked.
        lives: name of a whole number that parts recorded -> its value for each latent.
    """
    latents = list(picked)
    texts = latent_examples.examples(sae, data.source, survey, latents, BEFORE, AFTER)
    near = latent_examples.neighbours(sae, latents)
    lenses: Sequence[Lens | None] = [None] * len(latents)
    if data.model is not None and not latent_examples.why_no_lens(sae, data.model):
        lenses = latent_examples.lenses(sae, latents, data.model)
    return [
        Latent(
            index=latent,
            group=picked[latent],
            density=float(survey.density[latent]),
            loss_share=float(survey.loss_share[latent]),
            largest=float(survey.strongest[0, latent]),
            examples=texts[latent],
            lens=lenses[i],
            neighbours=near[i],
            life={name: int(column[latent]) for name, column in lives.items()},
        )
        for i, latent in enumerate(latents)
    ]


def _lives(run: RunFolder, cell: Member) -> dict[str, list[int]]:
    """Whole numbers that parts recorded of each latent in `latents.parquet`; {} without any."""
    path = run.file(f"{CELLS}/{cell.id.folder}/{FILE}")
    if not path.is_file():
        return {}
    names = [name for name, whole in column_types(path).items() if whole and name not in COMMON]
    return read_columns(path, dict.fromkeys(names, "whole")).to_pydict() if names else {}


def _steps(run: RunFolder, cell: Member) -> int | None:
    gates = run.gates if run.with_files(GATE).has(GATE) else {}
    facts = gates.get(cell.id.name, {}).get("facts", {})
    return int(facts["steps"]) if facts.get("steps") else None
