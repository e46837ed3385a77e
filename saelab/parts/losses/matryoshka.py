"""Matryoshka: the first latents reconstruct on their own. Bussmann et al. 2025 (2503.17547), eq. 4.

    coefficient * sum over prefixes m of w_m |x - (sum_{i in m} f_i W_dec_i + b_dec)|^2 / d_in

It stands beside `reconstruction`, which is the term of the whole width, and over any activation.

`sampled` draws the widths anew at each step, P(width > w) falling with the root of w (Nabeshima
2024; repository noanabeshima/matryoshka-saes). There the mean over prefixes and the whole is taken,
here their sum, so that a penalty's coefficient is sampled + 1 times theirs. `order = "energy"`
counts the prefixes along the latents sorted by a running mean of f_i^2 |W_dec_i|^2, as there;
latents stay where they are and the order is held here. `detached` fits each ring between two widths
to what the prefix within it, held constant with its b_dec, leaves over (Chanin 2026; repository
chanind/claude-auto-research-synthsaebench).

On a sparse code each row has one bag of pairs for every ring of latents between two widths: the
reconstructions of the prefixes are running sums over the rings.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn.functional import pad

from saelab.errors import SettingError
from saelab.kernels import Support, decode_at
from saelab.parts.base import Dims, Example, LossTerm, PartConfig, Pass
from saelab.seeding import torch_stream

#: Weight of the past in the running energy; Nabeshima's. Its start needs no correction, since an
#: order does not depend on a common factor.
MOMENTUM = 0.95


def _rising(shares: tuple[float, ...]) -> tuple[float, ...]:
    """Returns the shares. Raises: ValueError where they do not rise within (0, 1)."""
    if not shares or list(shares) != sorted({*shares}) or shares[0] <= 0 or shares[-1] >= 1:
        raise ValueError("should rise strictly, from above 0 to below 1")
    return shares


class MatryoshkaConfig(PartConfig):
    """Settings of the term.

    Args:
        shares: of all latents, the width of each prefix.
        widths: of the prefixes in latents, instead of shares.
        sampled: number of prefixes whose widths are drawn at each step, instead of shares; 0 for
            none.
        least: smallest width that is drawn.
        weights: of the prefixes' errors; 1 each where none are given.
        detached: whether a ring sees the prefix within it as constant.
        order: 'index' as the latents are, or 'energy' by their running contribution.
        coefficient: of the sum over prefixes.
    """

    kind: Literal["matryoshka"] = "matryoshka"
    shares: Annotated[tuple[float, ...], AfterValidator(_rising)] = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
    widths: tuple[PositiveInt, ...] = ()
    sampled: int = Field(default=0, ge=0)
    least: PositiveInt = 1
    weights: tuple[PositiveFloat, ...] = ()
    detached: bool = False
    order: Literal["index", "energy"] = "index"
    coefficient: PositiveFloat = 1.0

    def build(self, dims: Dims) -> Matryoshka:
        return Matryoshka(self, dims)

    @classmethod
    def examples(cls, d_sae: int) -> tuple[Example, ...]:
        fixed = cls(widths=(d_sae // 4, d_sae // 2), weights=(2.0, 0.5), detached=True)
        sampled = cls(sampled=3, order="energy", coefficient=0.25)
        return cls.example(d_sae), Example(fixed), Example(sampled)


class Matryoshka(LossTerm):
    shardable = True

    def __init__(self, config: MatryoshkaConfig, dims: Dims) -> None:
        super().__init__()
        self.config, self.d_sae, self.seed = config, dims.d_sae, dims.seed
        self.coefficient = config.coefficient
        self.first = dims.ranks.own(dims.d_sae).start
        self.fixed = [] if config.sampled else self._fixed_widths()
        prefixes = config.sampled or len(self.fixed)
        if config.sampled > dims.d_sae - config.least:
            remedy = f"there are {max(0, dims.d_sae - config.least)} such widths: draw fewer"
            raise SettingError("matryoshka.sampled", config.sampled, remedy)
        if config.weights and len(config.weights) != prefixes:
            remedy = f"there are {prefixes} prefixes: give each a weight, or none"
            raise SettingError("matryoshka.weights", config.weights, remedy)
        if config.order == "energy":
            self.per_latent = ("energy",)
            self.register_buffer("energy", torch.zeros(dims.n_local, dtype=torch.float32))

    def _fixed_widths(self) -> list[int]:
        c, whole = self.config, self.d_sae
        widths = list(c.widths) or [round(share * whole) for share in c.shares]
        if sorted({0, *widths, whole}) != [0, *widths, whole]:
            name = "widths" if c.widths else "shares"
            remedy = f"gives equal, empty or falling prefixes of {whole} latents: use fewer"
            raise SettingError(f"matryoshka.{name}", getattr(c, name), remedy)
        return widths

    def widths(self, step: int) -> list[int]:
        """Widths of the prefixes at a step, rising; drawn ones are distinct.

        A width w from least to d_sae - 1 has a probability in proportion to
        sqrt(w - least + 1) - sqrt(w - least).
        """
        if not self.config.sampled:
            return self.fixed
        stream = torch_stream(self.seed, "matryoshka", step)
        drawn, least = set[int](), self.config.least
        while len(drawn) < self.config.sampled:
            share = float(torch.rand((), generator=stream, dtype=torch.float64, device="cpu"))
            drawn.add(least + int((self.d_sae - least) * share**2))
        return sorted(drawn)

    def places(self) -> Tensor:
        """Place of each of this rank's latents in the order of the prefixes; int64 [n_local]."""
        if self.config.order == "index":
            local = self.ranks.own(self.d_sae)
            return torch.arange(local.start, local.stop, dtype=torch.int64, device="cpu")
        energy = self.get_buffer("energy")
        if self.ranks.latents == 1:
            return _places(energy)
        parts = [self.ranks.own(self.d_sae, part) for part in range(self.ranks.latents)]
        most = max(part.stop - part.start for part in parts)
        padded = pad(energy, (0, most - len(energy)), value=-1.0)  # behind all others
        mine = self.ranks.part_of_latents * most
        return _places(self.ranks.gather(padded))[mine : mine + len(energy)]

    def loss(self, p: Pass) -> Tensor:
        widths = self.widths(p.step)
        ends = torch.tensor(widths, dtype=torch.int64, device=p.x.device)
        ring = torch.bucketize(self.places().to(p.x.device), ends, right=True)
        support = p.code.support
        parts = self._dense(p, ring) if support is None else self._sparse(p, support, ring)
        rings = self.ranks.over_latents(parts)
        weights = self.config.weights or (1.0,) * rings.shape[1]
        wanted = p.target - p.offset
        error: Any = _PrefixErrors.apply(rings, wanted, weights, self.config.detached)
        return p.setting(self.coefficient) * p.share(error / wanted.numel())

    def _sparse(self, p: Pass, support: Support, ring: Tensor) -> Tensor:
        """The share of each ring in the reconstruction; [rows, rings, d_in]."""
        rings, ring = self.config.sampled or len(self.fixed), ring[support.latents]
        inner = (ring < rings).nonzero().flatten()
        bags = support.rows[inner] * rings + ring[inner]
        if bool((bags.diff() < 0).any()):
            bags, order = bags.sort(stable=True)
            inner = inner[order]
        counts = bags.bincount(minlength=support.n_rows * rings)
        edges = pad(counts.cumsum(0), (1, 0))
        inside = Support(edges, support.latents[inner], support.d_sae)
        product = decode_at(p.code.values[inner], p.sae.W_dec, inside)
        return product.view(support.n_rows, rings, -1)

    def _dense(self, p: Pass, ring: Tensor) -> Tensor:
        parts = []
        for i in range(self.config.sampled or len(self.fixed)):
            inside = (ring == i).nonzero().flatten()
            values, rows = (
                p.code.values.index_select(1, inside),
                p.sae.W_dec.index_select(0, inside),
            )
            parts.append(values @ rows)
        return torch.stack(parts, dim=1)

    def update(self, p: Pass) -> None:
        if self.config.order == "energy":
            now = self.ranks.over_rows(p.energy) / p.n
            self.get_buffer("energy").mul_(MOMENTUM).add_(now, alpha=1 - MOMENTUM)

    def forget(self, latents: Tensor) -> None:
        """Sends new latents to the end of the order."""
        if self.config.order == "energy":
            self.get_buffer("energy")[latents] = 0

    def latent_columns(self) -> dict[str, Tensor]:
        return {"matryoshka.place": self.places()} if self.config.order == "energy" else {}


class _PrefixErrors(torch.autograd.Function):
    """Computes sum over m of w_m |rings_1 + ... + rings_m - wanted|^2, and its gradient in place.

    Autograd would hold and pass over a tensor of all prefixes for every operation.
    """

    @staticmethod
    def forward(
        ctx: Any, rings: Tensor, wanted: Tensor, weights: tuple[float, ...], detached: bool
    ) -> Tensor:
        """Returns the sum, for rings [n, prefixes, d] and wanted [n, d]."""
        n, prefixes, d = rings.shape
        errors, total = rings.new_empty(prefixes, n, d), rings.new_zeros(())
        for i, weight in enumerate(weights):
            if i == 0:
                torch.sub(rings[:, 0], wanted, out=errors[0])
            else:
                torch.add(errors[i - 1], rings[:, i], out=errors[i])
            flat = errors[i].view(-1)
            total += weight * flat.dot(flat)
        ctx.save_for_backward(errors)
        ctx.weights, ctx.detached = weights, detached
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        """Returns the gradients: a ring is in its own prefix, and in all wider ones."""
        (grad,), (errors,) = grads, ctx.saved_tensors
        prefixes, n, d = errors.shape
        of_rings = errors.new_empty(n, prefixes, d)
        for i in reversed(range(prefixes)):
            factor = 2 * ctx.weights[i] * grad
            if ctx.detached or i == prefixes - 1:
                torch.mul(errors[i], factor, out=of_rings[:, i])
            else:
                torch.addcmul(of_rings[:, i + 1], errors[i], factor, out=of_rings[:, i])
        if not ctx.needs_input_grad[1]:
            return of_rings, None, None, None
        if ctx.detached:  # the offset is part of what is held constant, but for the first prefix
            return of_rings, -of_rings[:, 0], None, None
        weights = errors.new_tensor(ctx.weights) * (-2 * grad)
        return of_rings, torch.einsum("m,mnd->nd", weights, errors), None, None


def _places(energy: Tensor) -> Tensor:
    """Place of each entry when they fall; equal ones stay in their order."""
    order = energy.argsort(descending=True, stable=True)
    count = torch.arange(len(order), dtype=torch.int64, device=order.device)
    return torch.empty_like(order).scatter_(0, order, count)
