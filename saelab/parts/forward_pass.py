"""Dimensions that a part is built for, and one forward pass as the parts see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from saelab.distributed.ranks import ALONE, Ranks
from saelab.kernels import Code, row_norms
from saelab.runtime.counting import count

if TYPE_CHECKING:
    from saelab.parts.base import Part
    from saelab.sae import SAE


class SplicedTokens(Protocol):
    """The language model on the contexts of a batch, with and without the SAE in it.

    Attributes:
        ids: tokens, int64 [contexts, positions].
        mask: bool [contexts, positions]; True at the positions of the batch's rows.
    """

    ids: Tensor
    mask: Tensor

    def clean_logits(self) -> Tensor:
        """Returns the model's own logits, float32 [contexts, positions, vocabulary]."""
        ...

    def spliced_logits(self, recon: Tensor) -> Tensor:
        """Returns the logits where reconstructions replace the activations of the batch's rows,
        with gradients to them.

        Args:
            recon: raw activation space, [N, d_out].
        """
        ...


@dataclass(frozen=True)
class Dims:
    """Dimensions and circumstances that a part is built for.

    Args:
        d_in, d_sae: width of the input, of all its hook points together, and number of latents.
        inputs: width of each hook point of the input; () for a single one.
        targets: width of each hook point of the target; () where the input is the target.
        steps: number of optimiser steps of the run.
        seed: of the part's named streams.
        ranks: the processes that the SAE is trained on.
    """

    d_in: int
    d_sae: int
    _: KW_ONLY
    inputs: tuple[int, ...] = ()
    targets: tuple[int, ...] = ()
    steps: int = 1
    seed: int = 0
    ranks: Ranks = ALONE

    @property
    def d_out(self) -> int:
        """Width of what is reconstructed, of all its hook points together."""
        return sum(self.targets) or self.d_in

    @property
    def input_blocks(self) -> tuple[int, ...]:
        """Width of each hook point of the input."""
        return self.inputs or (self.d_in,)

    @property
    def target_blocks(self) -> tuple[int, ...]:
        """Width of each hook point of what is reconstructed."""
        return self.targets or self.input_blocks

    @property
    def n_local(self) -> int:
        """Number of the d_sae latents that this rank has: the length of tensors per latent."""
        local = self.ranks.own(self.d_sae)
        return local.stop - local.start


@dataclass(eq=False, kw_only=True)
class Pass:
    """One forward pass, as losses, controllers and observers see it.

    Args:
        x: input in normalised space, float32 [N, d_in].
        target: what is reconstructed, in normalised space; equal to x for an SAE; [N, d_out].
        u: encoder input, float32 [N, d_in].
        code: the code, sparse or dense.
        recon: reconstruction in normalised space, [N, d_out].
        sae: the model.
        step: optimiser steps done before this pass; `steps` is their number in the run.
        settings: values of the controllers by name.
        starts: int64 [m + 1], where segments of rows that follow each other begin; None for
            shuffled rows.
        norms: of the decoder's rows, where they came with its product; see `decoder_norms`.
        stored_z: the value of `z`, or a function that computes it, for parts that read it rarely;
            None unless a part declares `uses_preactivations`.
        batch_rows: rows of the whole batch, where x is one rank's part of it.
        gradient_norms: of each weight's gradient before clipping, by name; the loop adds them
            after the backward pass, for `update` and observers.
        rate: share of the full learning rate at this step; the loop adds it likewise.
        results: by part, what it has computed on this pass and needs again in its `update`.
        spliced: the language model on the tokens of the batch; None unless a part declares
            `needs_model`.
    """

    x: Tensor
    target: Tensor
    u: Tensor
    code: Code
    recon: Tensor
    sae: SAE
    step: int
    steps: int
    settings: dict[str, float]
    starts: Tensor | None
    norms: Tensor | None = None
    stored_z: Tensor | Callable[[], Tensor] | None = None
    batch_rows: int | None = None

    @torch.no_grad()
    def __repr__(self) -> str:
        """Returns sizes, L0 and the fraction of variance unexplained, in normalised space."""
        rows, active = self.x.shape[0], int(self.code.values.count_nonzero())
        error = (self.recon - self.target).square().sum()
        variance = (self.target - self.target.mean(0)).square().sum()
        sizes = (
            f"{count(rows, 'row')} of width {self.x.shape[1]}, {count(self.sae.d_sae, 'latent')}"
        )
        return (
            f"Pass(step {self.step} of {self.steps}: {sizes}, "
            f"L0 {active / max(rows, 1):.4g}, FVU {float(error / variance):.4g}, "
            f"settings {self.settings})"
        )

    @property
    def z(self) -> Tensor:
        """All pre-activations, without gradient, in the selection's dtype; [N, d_sae].

        It is the largest tensor of a pass, and freed once the code is computed unless a part
        reads it.

        Raises: RuntimeError when no part of the SAE declares that it reads it.
        """
        if self.stored_z is None:
            raise RuntimeError(
                "all pre-activations are stored only where a part declares that it "
                "reads them: set its uses_preactivations = True"
            )
        if not isinstance(self.stored_z, Tensor):
            self.stored_z = self.stored_z()
        return self.stored_z

    gradient_norms: dict[str, float] = field(default_factory=dict)
    rate: float = 1.0
    results: dict[Part, Any] = field(default_factory=dict)
    spliced: SplicedTokens | None = None

    @cached_property
    def decoder_norms(self) -> Tensor:
        """|W_dec_i| of each latent with its gradient; [d_sae]. Where several hook points are
        reconstructed, the sum of the norms at each (Lindsey et al. 2024)."""
        if self.norms is not None:
            return self.norms
        blocks = self.sae.dims.target_blocks
        if len(blocks) == 1:
            return row_norms(self.sae.W_dec)
        parts = self.sae.W_dec.split(blocks, dim=1)
        return torch.stack([row_norms(part.contiguous()) for part in parts]).sum(0)

    @torch.no_grad()
    def block_errors(self) -> list[Tensor]:
        """Returns the share of the mean squared error at each hook point that this rank's rows
        have; its fraction of variance unexplained, since each is scaled by itself."""
        error = (self.recon - self.target).square()
        blocks = self.sae.dims.target_blocks
        return [self.share(part.mean()) for part in error.split(blocks, dim=1)]

    @cached_property
    def sizes(self) -> Code:
        """The code with |f| for f, whose gradient is the sign of f, for penalties and energies of
        its values; where no activation is negative this is the code."""
        code = self.code
        if not self.sae.activation.signed:
            return code
        return Code(code.values.abs(), code.pre, code.support)

    @property
    def offset(self) -> Tensor:
        """Summand that `recon` has besides the decoded code, with its gradient; [d_out], or with a
        skip connection [N, d_out]."""
        return self.sae.offset(self.x)

    @property
    def n(self) -> int:
        """Rows of the batch, over all ranks."""
        return self.x.shape[0] if self.batch_rows is None else self.batch_rows

    def share(self, value: Tensor) -> Tensor:
        """The share of a mean over this rank's rows in the mean over the batch's rows."""
        local = self.x.shape[0]
        return value if local == self.n else value * (local / self.n)

    def mean(self, x: Tensor) -> Tensor:
        """Mean over the batch's rows, without gradient; x [rows of this rank, ...]."""
        ranks = self.sae.ranks
        return x.mean(0) if ranks.data == 1 else ranks.over_rows(x.sum(0)) / self.n

    @cached_property
    def firings(self) -> Tensor:
        """Number of the batch's rows in which each of this rank's latents fires; int64."""
        return self.sae.ranks.over_rows(self.code.firings)

    @cached_property
    def l0(self) -> float:
        """Mean number of active latents per row of the batch."""
        if self.sae.ranks.alone:
            return self.code.l0
        return self.sae.ranks.total(self.code.active_pairs)[0] / self.n

    @cached_property
    def energy(self) -> Tensor:
        """sum_n f_ni^2 |W_dec_i|^2 of each latent over the batch; [d_sae], without gradient."""
        several = len(self.sae.dims.target_blocks) > 1
        norms = row_norms(self.sae.W_dec) if several else self.decoder_norms
        return self.code.sums[1] * norms.detach().square()

    def setting(self, value: float | str) -> float:
        """A number as it is; a name is looked up among the controllers."""
        return self.settings[value] if isinstance(value, str) else value
