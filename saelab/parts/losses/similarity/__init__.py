"""Idea B: similar decoder rows and codes that fire together are penalised, under a balance.

    coefficient * [ alpha * S_act / n_act + (1 - alpha) * S_w / n_w ]

S_w: `decoder.py`; S_act: `code.py`; alpha: `balance.py`. Each term is divided by a constant: with
the norm 'reference' its mean over a window right after the sparsity warm-up, so that the penalty
fades as similarity falls. The penalty acts from the end of that window on, whatever the norm;
before, the terms are only measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from saelab import stats
from saelab.errors import SettingError
from saelab.parts.base import (
    Dims,
    Latents,
    LossTerm,
    PartConfig,
    Pass,
    Scalar,
    check_setting,
    measurement,
)
from saelab.parts.losses.similarity.balance import Terms, build_balance
from saelab.parts.losses.similarity.code import (
    Gradient,
    Standard,
    code_similarity,
    dense_columns,
    product_moments,
)
from saelab.parts.losses.similarity.decoder import Form, deal, decoder_similarity
from saelab.parts.losses.similarity.running import LatentMoments, std_of
from saelab.seeding import torch_stream
from saelab.storage.atomic import read_json

if TYPE_CHECKING:
    from saelab.sae import SAE

#: Smallest norm of a term. Our choice: correlations of a hundredth, which do no harm.
FLOOR = 1e-4
#: Scalars of a step's record. A share is the norm of the penalty's gradient over that of the whole
#: gradient before clipping: of S_act at W_enc, of S_w at W_dec, and of both.
LOGGED = {
    "alpha": Scalar("share of codes in the penalty, against decoder rows"),
    "similarity.code": measurement("similarity of codes, S_act"),
    "similarity.decoder": measurement("similarity of decoder rows, S_w"),
    "penalty_share.code": measurement("share of S_act in the gradient at W_enc"),
    "penalty_share.decoder": measurement("share of S_w in the gradient at W_dec"),
    "penalty_share": Scalar("share of the penalty in the gradient", "measured"),
    "similarity.k": measurement("latents in the similarity of codes", "latents"),
}

Statistics = Literal["per_latent", "per_product", "batch"]
Norm = Literal["reference", "running", "none"]
BalanceKind = Literal[
    "fixed", "descent", "uncertainty", "minimax", "gradnorm", "replay", "frozen_random"
]
#: Balances whose alpha the run decides.
LEARNED = ("descent", "uncertainty", "minimax", "gradnorm")
Alpha = Annotated[float, Field(ge=0, le=1)]


def _read(path: Any) -> Any:
    return read_json(Path(path)) if isinstance(path, str) else path


class SimilarityConfig(PartConfig):
    """Settings of the penalty.

    Args:
        coefficient: total strength under every balance; a number or a controller's name.
        balance, alpha: how the share of S_act is set, and its (first) value.
        path: of 'replay': alphas evenly spaced over the run, or the name of a JSON file with a list
            of them, which is read at once.
        eta, entropy: of 'minimax'.
        statistics: what codes are standardised by: running mean and std of each latent, running
            mean and std of the products over all pairs, or the batch's own mean and std.
        gradient: 'scale_free', or 'constant', which shrinking pays.
        norm: 'reference', 'running' (the term stays at 1 for ever) or 'none'.
        warmup, window: shares of the run before and of the reference window; below 1 together.
        momentum: of all EMAs.
        k: latents in S_act; a number or a controller's name; at most `k_max`.
        k_max: the most latents in S_act.
        form: of S_w: the row maximum or the mean.
        chunk, chunks: decoder rows compared with each other, and how many such chunks a step uses
            (None: all).
        lr: of a learned balance.
    """

    kind: Literal["similarity"] = "similarity"
    coefficient: float | str = 0.01
    balance: BalanceKind = "fixed"
    alpha: Alpha = 0.5
    path: Annotated[tuple[Alpha, ...], BeforeValidator(_read)] = ()
    eta: float = Field(default=0.01, gt=0, le=1)
    entropy: PositiveFloat = 0.5
    statistics: Statistics = "per_latent"
    gradient: Gradient = "scale_free"
    norm: Norm = "reference"
    warmup: float = Field(default=0.15, ge=0, lt=1)
    window: float = Field(default=0.05, gt=0, lt=1)
    momentum: float = Field(default=0.99, ge=0, lt=1)
    k: Latents = 100
    k_max: PositiveInt = 512
    form: Form = "max"
    chunk: int = Field(default=512, ge=2)
    chunks: PositiveInt | None = None
    lr: NonNegativeFloat | None = 1e-2

    def build(self, dims: Dims) -> Similarity:
        return Similarity(self, dims)

    @property
    def logged(self) -> Mapping[str, Scalar]:
        return LOGGED


@dataclass(frozen=True, kw_only=True)
class PassTerms:
    """Alpha and the terms of one pass, with gradient, and the norms of the terms' gradients; 0-dim.

    f: columns of the latents in S_act, [N, k].
    """

    alpha: Tensor
    act: Tensor
    weight: Tensor
    act_gradient: Tensor
    weight_gradient: Tensor
    f: Tensor

    def numbers(self) -> Terms:
        values = (self.act, self.weight, self.act_gradient, self.weight_gradient)
        return Terms(*torch.stack([value.detach() for value in values]).tolist())


class Similarity(LossTerm):
    per_latent = ("moments.weight",)
    uses_decoder_norms = True
    products: Tensor
    running: Tensor
    updates: Tensor
    window: Tensor
    shown: Tensor

    def __init__(self, config: SimilarityConfig, dims: Dims) -> None:
        super().__init__()
        _check(config)
        self.config, self.lr, self.coefficient = config, config.lr, config.coefficient
        self.seed = dims.seed
        self.first = round(config.warmup * dims.steps)
        #: First step in which the penalty acts.
        self.start = self.first + max(1, round(config.window * dims.steps))
        self.balance = build_balance(config, dims.seed)
        self.moments = LatentMoments(dims.d_sae, config.momentum)
        # EMAs of the products and their squares, of the two terms, and how many updates they had
        self.register_buffer("products", torch.zeros(2, dtype=torch.float32))
        self.register_buffer("running", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        # sums of both terms over the reference window, and its steps
        self.register_buffer("window", torch.zeros(3, dtype=torch.float64))
        self.register_buffer("shown", torch.zeros(len(LOGGED), dtype=torch.float64))

    def check(self, sae: SAE) -> None:
        super().check(sae)
        check_setting("k", self.config.k, sae)

    def loss(self, p: Pass) -> Tensor:
        here = self._measure(p)
        p.results[self], terms = here, here.numbers()
        n_act, n_weight = self._norms(terms)
        strength = p.setting(self.coefficient) if self._is_active(p) else 0.0
        act, weight = here.act / n_act, here.weight / n_weight
        loss = strength * (here.alpha * act + (1 - here.alpha) * weight)
        objective = self.balance.objective(act.detach(), weight.detach())
        return loss if objective is None else loss + objective * float(self._is_active(p))

    @torch.no_grad()
    def update(self, p: Pass) -> None:
        here: PassTerms = p.results[self] if self in p.results else self._measure(p)
        terms = here.numbers()
        n_act, n_weight = self._norms(terms)
        relative = Terms(
            terms.act / n_act,
            terms.weight / n_weight,
            terms.act_gradient / n_act,
            terms.weight_gradient / n_weight,
        )
        alpha = float(here.alpha)
        strength = p.setting(self.coefficient) if self._is_active(p) else 0.0
        parts = {
            "W_enc": strength * alpha * relative.act_gradient,
            "W_dec": strength * (1 - alpha) * relative.weight_gradient,
        }
        shares = _shares(parts, p.gradient_norms)
        shown = [alpha, terms.act, terms.weight, *shares, here.f.shape[1]]
        self.shown.copy_(self.shown.new_tensor(shown))
        if self._is_active(p):
            self.balance.update(relative)
        self._gather(p, here, terms)

    def forget(self, latents: Tensor) -> None:
        self.moments.forget(latents)

    def scalars(self) -> dict[str, float]:
        return dict(zip(LOGGED, self.shown.tolist(), strict=True))

    def facts(
        self, columns: Mapping[str, np.ndarray], travel: Callable[[nn.Parameter], float]
    ) -> dict[str, float]:
        """The mean share of the gradient while the penalty acts, and whether a learned alpha
        collapsed or hardly moved."""
        facts: dict[str, float] = {}
        share, alpha = columns["penalty_share"], columns["alpha"]
        if (share > 0).any():
            facts["penalty_share"] = float(share[share > 0].mean())
        if self.config.balance in LEARNED:
            facts["alpha_outside_share"] = stats.outside_share(alpha)
        learned = list(self.balance.parameters())
        if learned:
            reach = sum(parameter.numel() * travel(parameter) for parameter in learned)
            facts["scalar_reach.alpha"] = stats.moved_share(alpha, reach)
            facts["scalar_moved.alpha"] = stats.moved_share(alpha, 1.0)
        return facts

    def _is_active(self, p: Pass) -> bool:
        return p.step >= self.start and float(self.window[2]) > 0

    def _k(self, p: Pass) -> int:
        return min(int(p.setting(self.config.k)), self.config.k_max, p.sae.d_sae)

    def _norms(self, terms: Terms) -> tuple[float, float]:
        """Norms that S_act and S_w are divided by; the terms themselves before there is one."""
        now = [terms.act, terms.weight]
        if self.config.norm == "none":
            return 1.0, 1.0
        if self.config.norm == "running":
            weight = 1 - self.config.momentum ** int(self.updates)
            norms = (self.running / weight).tolist() if weight > 0 else now
        else:
            act, weight, steps = self.window.tolist()
            norms = [act / steps, weight / steps] if steps else now
        return max(norms[0], FLOOR), max(norms[1], FLOOR)

    def _measure(self, p: Pass) -> PassTerms:
        c = self.config
        latents = p.energy.topk(self._k(p)).indices
        latents = latents[p.energy[latents] > 0]
        f = dense_columns(p.code, latents)
        by = self._standard(p, latents, f)
        act, act_gradient = code_similarity(p.code, p.u, latents, f, by, c.gradient)
        draw = torch_stream(self.seed, "similarity chunks", p.step)
        chunks = deal(p.sae.d_sae, c.chunk, draw)[: c.chunks]
        weight, weight_gradient = decoder_similarity(p.sae.W_dec, chunks, c.form)
        alpha = self.balance.alpha(p.step, p.steps)
        return PassTerms(
            alpha=alpha,
            act=act,
            weight=weight,
            act_gradient=act_gradient,
            weight_gradient=weight_gradient,
            f=f,
        )

    @torch.no_grad()
    def _standard(self, p: Pass, latents: Tensor, f: Tensor) -> Standard:
        """The constants of this pass; those of the batch where nothing has been gathered yet."""
        nought, one = f.new_zeros(()), f.new_ones(())
        if self.config.statistics == "per_product":
            raw = self._corrected(self.products) if self.updates else product_moments(f)
            spread = std_of(raw[0], raw[1]).clamp_min(torch.finfo(f.dtype).tiny)
            return Standard(nought, one, raw[0], spread)
        if self.config.statistics == "per_latent":
            mean, std = self.moments.standard(p.code, p.n)
            return Standard(mean[latents], std[latents], nought, one)
        mean = f.mean(0)
        std = std_of(mean, f.square().mean(0)).clamp_min(torch.finfo(f.dtype).tiny)
        return Standard(mean, std, nought, one)

    def _corrected(self, ema: Tensor) -> Tensor:
        return ema / (1 - self.config.momentum ** int(self.updates))

    def _gather(self, p: Pass, here: PassTerms, terms: Terms) -> None:
        """Takes one pass into all EMAs and, inside it, into the reference window."""
        keep, both = self.config.momentum, self.running.new_tensor([terms.act, terms.weight])
        if self.config.statistics == "per_latent":
            self.moments.gather(p.code, p.n)
        elif self.config.statistics == "per_product":
            self.products.mul_(keep).add_(product_moments(here.f), alpha=1 - keep)
        self.running.mul_(keep).add_(both, alpha=1 - keep)
        self.updates += 1
        if self.first <= p.step < self.start:
            self.window += torch.cat([both, both.new_ones(1)])


def _shares(parts: dict[str, float], totals: dict[str, float]) -> list[float]:
    """Norms at W_enc, at W_dec and at both over the whole gradient's; 0 where that is 0."""
    inside = [parts[name] for name in ("W_enc", "W_dec")]
    whole = [totals.get(name, 0.0) for name in ("W_enc", "W_dec")]
    inside.append((inside[0] ** 2 + inside[1] ** 2) ** 0.5)
    whole.append((whole[0] ** 2 + whole[1] ** 2) ** 0.5)
    return [a / b if b > 0 else 0.0 for a, b in zip(inside, whole, strict=True)]


def _check(config: SimilarityConfig) -> None:
    if config.balance in LEARNED and not 0 < config.alpha < 1:
        remedy = f"balance {config.balance!r} needs a start inside (0, 1)"
        raise SettingError("alpha", config.alpha, remedy)
    if config.balance == "replay" and not config.path:
        raise SettingError("path", config.path, "balance 'replay' needs the alphas of another run")
    if config.warmup + config.window >= 1:
        remedy = "the penalty would never act: warmup + window must be below 1"
        raise SettingError("window", config.window, remedy)
