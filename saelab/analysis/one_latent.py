"""One latent of a saved SAE: contexts, density, logit lens and neighbours, as the report's feature
browser has them (`saelab.analysis.latents`), and text that is generated with it raised."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from saelab import formats
from saelab.analysis.attach import attach
from saelab.analysis.code_edits import check_latent, check_value
from saelab.analysis.evaluate import settings_of
from saelab.analysis.latents import HeldOut, Latent, describe
from saelab.data import language_model
from saelab.errors import MismatchError, SettingError
from saelab.evals import latent_examples
from saelab.evals.latent_examples import Example
from saelab.launch.prepare import held_out
from saelab.runs.folder import run_cells
from saelab.runtime.counting import count
from saelab.sae import SAE
from saelab.study.plan import BaseConfig

#: How line breaks inside tokens are shown.
LINE_BREAK = "⏎"


@dataclass(frozen=True, eq=False, kw_only=True)
class LatentView:
    """One latent on held-out text; `lines` for a terminal, `as_dict` as plain data.

    Args:
        latent: its numbers, contexts, logit lens and neighbours.
        d_sae, tokens: number of all latents, and of the held-out tokens that were encoded.
        why_no_lens, why_no_text: the reason why that is missing; '' if it is there.
        texts: of the contexts.
    """

    latent: Latent
    d_sae: int
    tokens: int
    why_no_lens: str
    why_no_text: str
    texts: HeldOut

    def __repr__(self) -> str:
        return "\n".join(self.lines())

    def as_dict(self) -> dict[str, Any]:
        """Returns plain data: numbers, and tokens as text."""
        one, lens = self.latent, self.latent.lens
        token = self.texts.token
        return {
            "latent": one.index,
            "d_sae": self.d_sae,
            "tokens": self.tokens,
            "density": one.density,
            "loss_share": one.loss_share,
            "largest": one.largest,
            "contexts": [self._context(example) for example in one.examples],
            "raised": [[token(i), value] for i, value in lens.raised] if lens else [],
            "lowered": [[token(i), value] for i, value in lens.lowered] if lens else [],
            "neighbours": [[i, cosine] for i, cosine in one.neighbours],
            "why_no_lens": self.why_no_lens,
            "why_no_text": self.why_no_text,
        }

    def lines(self) -> Iterator[str]:
        """Yields lines for a terminal."""
        data = self.as_dict()
        yield f"latent {data['latent']} of {self.d_sae}, on {count(self.tokens, 'held-out token')}"
        yield (
            f"density {data['density']:.3g}   share of the loss {data['loss_share']:.3g}   "
            f"largest value {data['largest']:.4g}"
        )
        near = ", ".join(f"{i} ({cosine:.2f})" for i, cosine in data["neighbours"])
        yield f"nearest decoder rows (cosine)  {near or 'none: it is the only latent'}"
        for name in ("raised", "lowered"):
            shown = ", ".join(f"{_on_one_line(t)!r} {value:+.2f}" for t, value in data[name])
            yield f"tokens {name}  {shown or self.why_no_lens}"
        yield "contexts, the strongest first" if data["contexts"] else "it never fires there"
        for context in data["contexts"]:
            yield f"{context['value']:9.4g}  {_marked(context) or self.why_no_text}"

    def _context(self, example: Example) -> dict[str, Any]:
        stop = example.start + len(example.values)
        words = [] if self.why_no_text else self.texts.words(example.context)[example.start : stop]
        peak = example.peak - example.start
        return {
            "context": example.context,
            "start": example.start,
            "peak": peak,
            "value": example.values[peak],
            "tokens": words,
            "values": list(example.values),
        }


@dataclass(frozen=True, kw_only=True)
class Steered:
    """Text with and without a latent raised.

    Args:
        prompt, latent, by: as given.
        plain, steered: the prompt and its continuation without and with it.
    """

    prompt: str
    latent: int
    by: float
    plain: str
    steered: str

    def lines(self) -> Iterator[str]:
        """Yields lines for a terminal."""
        yield "without steering"
        yield self.plain
        yield ""
        yield f"with latent {self.latent} raised by {self.by:g}"
        yield self.steered


def saved_sae(path: Path, config: Path | None = None, format: str = "") -> tuple[SAE, BaseConfig]:
    """Loads the SAE at a path, and the settings of the data that it belongs to.

    Args:
        path: a cell of a run, or the folder of an SAE in any format.
        config: a TOML file or run folder that names model, hook and text; by default the cell's.
        format: of the folder; '' recognises it.

    Raises: SettingError for a whole run, or without settings; MismatchError for an SAE of another
        model or hook.
    """
    cells = run_cells(path)
    if cells is not None:
        example = f", such as {cells[0].folder}" if cells else ""
        size = count(len(cells), "SAE")
        remedy = f"is a run with {size}: name the folder of one of its cells{example}"
        raise SettingError("SAE", str(path), remedy)
    loaded = formats.load(path, format)
    base, _ = settings_of(path, config)
    if base.activations is None:
        differences = loaded.origin.differences(base.model.path, base.hook_text)
        if differences:
            remedy = "name the settings that it was trained with by --config"
            raise MismatchError(f"the SAE {', and '.join(differences)}: {remedy}")
    return loaded.sae.to(torch.device(base.model.device)).eval(), base


@torch.no_grad()
def view_latents(
    sae: SAE, latents: Sequence[int], base: BaseConfig, cache: Path, examples: int = 8
) -> list[LatentView]:
    """Describes latents on the held-out text of a base, which is encoded once.

    Args:
        sae: in evaluation mode.
        latents: their indices.
        base: model, hook and text.
        cache: folder of harvested activations.
        examples: contexts of each latent.

    Raises: SettingError for a latent that does not exist, or fewer than one context;
        MismatchError for activations of another width.
    """
    picked = {check_latent(latent, sae.d_sae): "" for latent in latents}
    if examples < 1:
        raise SettingError("examples", examples, "show at least 1 context")
    data = HeldOut(*held_out(base, cache), "")
    if data.source.d != sae.d_in:
        remedy = "name the settings that it was trained with"
        raise MismatchError(
            f"the SAE has d_in = {sae.d_in}, the activations have {data.source.d}: {remedy}"
        )
    survey = latent_examples.survey(sae, data.source, examples)
    return [
        LatentView(
            latent=latent,
            d_sae=sae.d_sae,
            tokens=survey.tokens,
            why_no_lens=latent_examples.why_no_lens(sae, data.model),
            why_no_text=data.why_no_text,
            texts=data,
        )
        for latent in describe(sae, data, survey, picked, {})
    ]


def steer(
    sae: SAE, base: BaseConfig, latent: int, by: float, prompt: str, tokens: int = 40
) -> Steered:
    """Generates the most likely continuation of a prompt, with and without a latent raised at every
    token.

    Args:
        sae: in evaluation mode.
        base: model and hook.
        latent: its index.
        by: what is added to it, in the unit of the code.
        prompt: one text.
        tokens: at most so many new ones.

    Raises: SettingError for a latent that does not exist, or a base without a model; what `attach`
        raises.
    """
    check_latent(latent, sae.d_sae)
    check_value(by, "by")
    if base.activations is not None:
        remedy = "these were made elsewhere: name settings with a model"
        raise SettingError("activations", str(base.activations), remedy)
    model = language_model.load(base.model)
    hook, *others = base.input_hooks
    if others:
        raise SettingError("hook_name", base.hook_text, "steer an SAE that reads one hook point")
    with attach(model, sae, hook, target=base.target_hooks or None) as inside:
        plain = inside.generate(prompt, tokens)
        steered = inside.add(latent, by).generate(prompt, tokens)
    return Steered(prompt=prompt, latent=latent, by=by, plain=plain, steered=steered)


def _on_one_line(token: str) -> str:
    return token.replace("\r", "").replace("\n", LINE_BREAK)


def _marked(context: dict[str, Any]) -> str:
    """Returns the text of a context on one line, with the strongest token between » and «."""
    tokens = [_on_one_line(token) for token in context["tokens"]]
    if tokens:
        tokens[context["peak"]] = f"»{tokens[context['peak']]}«"
    return "".join(tokens)
