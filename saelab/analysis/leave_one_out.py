"""Leave-one-out refinement: active latents that the others make superfluous are set to 0.

    r   = x - b_dec - f W_dec                 what the SAE's code leaves over
    s_i = <r, d_i> + f_i |d_i|^2              |d_i|^2 times the least-squares value of latent i,
                                              given the values of all others
    f_i stays where s_i > threshold, and becomes 0 elsewhere; all latents at once

For inference alone, over the code of any SAE; stated by Bussmann in a comment on Chanin's "Letting
Claude do Autonomous Research to Improve SAEs" (LessWrong, 2026), with these lines of code and no
value of the threshold: 0, the default here, removes a latent whose best value is not positive. Of
a negative value of a signed code -s_i is compared, which is our extension.

Without one such latent the squared error of its row falls, by at least f_i^2 |d_i|^2. Without
several of them it may rise, since each score counts on the others: of two latents with one
direction and the same value, each of which alone would do, both go.

Cost of N rows with k active latents: 2 k N d_in multiplications after the encoder's N d_in d_sae.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from saelab.errors import SettingError
from saelab.kernels import Code, decode_at, encode_at, pool_codes
from saelab.row_norm import normalise_rows
from saelab.sae import SAE


class LeaveOneOut:
    """A subject: an SAE whose code is refined, see this module's equation.

    Args:
        sae: in evaluation mode, without a target: its error is not seen at inference.
        threshold: in units of the code, for decoder rows of norm 1.

    Raises: SettingError for an SAE with a target, and a threshold that is not finite.
    """

    def __init__(self, sae: SAE, threshold: float = 0.0) -> None:
        if sae.has_target:
            remedy = "needs the error of the reconstruction, which is of the target here, and a "
            remedy += "target is not seen at inference: evaluate the SAE without it"
            raise SettingError("leave_one_out", threshold, remedy)
        if not math.isfinite(threshold):
            raise SettingError("leave_one_out", threshold, "use a finite number, such as 0")
        self.sae, self.threshold = sae, threshold
        self.d_in, self.d_sae, self.signed = sae.d_in, sae.d_sae, sae.signed
        self.needs_contexts, self.origin = sae.needs_contexts, sae.origin

    @torch.no_grad()
    def encode(self, x: Tensor, starts: Tensor | None = None) -> Tensor:
        """Encodes raw activations [n, d_in] -> code [n, d_sae]."""
        blocks = [code.dense() for _, code in self.codes(x, starts)]
        return torch.cat(blocks) if blocks else x.new_zeros(0, self.d_sae)

    @torch.no_grad()
    def codes(self, x: Tensor, starts: Tensor | None = None) -> Iterator[tuple[slice, Code]]:
        """Yields the code in blocks of rows, as `SAE.codes` does."""
        rows = normalise_rows(x, self.sae.row_norm) / self.sae.scale
        for block, code in self.sae.codes(x, starts):
            scores = self._scores(rows[block], code)
            stays = code.values.sign() * scores > self.threshold
            yield block, Code(code.values * stays, code.pre, code.support)

    def _scores(self, x: Tensor, code: Code) -> Tensor:
        """Returns s_i in the shape of the code's values; x [n, d_in] in normalised space."""
        w, support = self.sae.W_dec, code.support
        squares = w.square().sum(1)
        if support is None:
            left = x - self.sae.b_dec - code.values @ w
            return left @ w.t() + code.values * squares
        left = x - self.sae.b_dec - decode_at(code.values, w, support)
        along = encode_at(left, w, torch.zeros_like(squares), support)
        return along + code.values * squares[support.latents]

    def decode(self, f: Tensor) -> Tensor:
        """Decodes a code [n, d_sae], as the SAE does; [n, d_in]."""
        return self.sae.decode(f)

    def decode_code(self, code: Code) -> Tensor:
        """Decodes a code of `codes`; [n, d_in]."""
        return self.sae.decode_code(code)

    def complete(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """Returns the reconstruction, as the SAE completes it."""
        return self.sae.complete(x_hat, x)

    @torch.no_grad()
    def pooled(self, rows: Tensor, cuts: Tensor, starts: Tensor | None = None) -> Tensor:
        """Sums the code over segments of rows, as `SAE.pooled` does; float32 [m, d_sae]."""
        return pool_codes(lambda starts: self.codes(rows, starts), rows, cuts, starts, self.d_sae)
