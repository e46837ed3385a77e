"""Contrast of adjacent tokens, on the first latents. T-SAE, Bhalla et al. 2025 (2511.05541).

    h = f of the first `share` of the latents;   S_ab = h_t(a) . h_t(b)-1 / temperature
    coefficient * (cross entropy of S's rows and of its columns with the diagonal) / (2 d_in)

A pair is a token and the one before it in a context; the other pairs of the batch are negatives.
One pair of each segment is drawn at each step. It stands beside `matryoshka` with the same share, a
BatchTopK and AuxK. After the released code (AI4LIFE-GROUP/temporal-saes): share .2, coefficient .1,
which a summary of the paper gives as 1. Deviations: there both tokens are encoded in batches of
their own, here in one, over which BatchTopK selects; there activations are raw and S has no
temperature, here rows have the mean square d_in, which is the temperature unless one is given; the
division by d_in is that of the reconstruction here.

It needs whole contexts (layout 'contexts'); rows without them have no pairs and the term is 0.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor
from torch.nn.functional import cross_entropy

from saelab.errors import SettingError
from saelab.parts.base import Dims, LossTerm, PartConfig, Pass
from saelab.seeding import torch_stream


class TemporalContrastConfig(PartConfig):
    """Settings of the term.

    Args:
        coefficient: of the mean cross entropy.
        share: of all latents, those that are to change slowly.
        temperature: of the products; None for d_in.
    """

    kind: Literal["temporal_contrast"] = "temporal_contrast"
    coefficient: PositiveFloat = 0.1
    share: float = Field(default=0.2, gt=0, le=1)
    temperature: PositiveFloat | None = None

    def build(self, dims: Dims) -> TemporalContrast:
        return TemporalContrast(self, dims)


class TemporalContrast(LossTerm):
    needs_contexts: ClassVar[bool] = True

    def __init__(self, config: TemporalContrastConfig, dims: Dims) -> None:
        super().__init__()
        self.coefficient, self.seed = config.coefficient, dims.seed
        self.temperature = config.temperature or float(dims.d_in)
        self.width = round(config.share * dims.d_sae)
        if not self.width:
            remedy = f"is less than one of {dims.d_sae} latents: use a larger share"
            raise SettingError("temporal_contrast.share", config.share, remedy)

    def second_rows(self, starts: Tensor, step: int) -> Tensor:
        """The row of the later token of each pair, one for each segment of two rows or more."""
        first, lengths = starts[:-1], starts.diff()
        first, lengths = first[lengths > 1], lengths[lengths > 1]
        stream = torch_stream(self.seed, "temporal contrast", step)
        share = torch.rand(len(first), generator=stream, dtype=torch.float64, device="cpu")
        return first + 1 + (share.to(first.device) * (lengths - 1)).long()

    def loss(self, p: Pass) -> Tensor:
        if p.starts is None:
            return p.recon.new_zeros(())
        later = self.second_rows(p.starts, p.step).to(p.x.device)
        if len(later) < 2:  # nothing to contrast with
            return p.recon.new_zeros(())
        values = self._values(p, torch.cat([later, later - 1]))
        now, before = values.split(len(later))
        products = now @ before.T / self.temperature
        diagonal = torch.arange(len(later), dtype=torch.int64, device=products.device)
        both = cross_entropy(products, diagonal) + cross_entropy(products.T, diagonal)
        return both * (p.setting(self.coefficient) / (2 * p.target.shape[1]))

    def _values(self, p: Pass, rows: Tensor) -> Tensor:
        """The code of the given rows and the first latents; a row may occur twice."""
        support = p.code.support
        if support is None:
            return p.code.values[rows, : self.width]
        unique, place = rows.unique(return_inverse=True)
        slots = unique.new_full((support.n_rows,), -1)
        slots[unique] = torch.arange(len(unique), dtype=torch.int64, device=rows.device)
        slot = slots[support.rows]
        inside = ((slot >= 0) & (support.latents < self.width)).nonzero().flatten()
        flat = slot[inside] * self.width + support.latents[inside]
        block = p.code.values.new_zeros(len(unique) * self.width)
        block = block.index_put((flat,), p.code.values[inside])
        return block.view(len(unique), self.width)[place]
