"""Code and reconstruction of an SAE with gradients to its input, at inference.

forward    the bits of `SAE.codes` and of the value that is given
backward   the derivative of the activation at the latents that are active, and of the decoder;
           weights and thresholds of the SAE are constants
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from saelab.kernels import Code
from saelab.row_norm import normalise_rows, restore_rows
from saelab.sae import SAE


def frozen_twin(sae: SAE, device: torch.device) -> SAE:
    """Returns an SAE in evaluation mode with the same weights, not copied, without gradients."""
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in sae.parameters()}
    buffers = {id(buffer): buffer for buffer in sae.buffers()}
    return copy.deepcopy(sae, {**shared, **buffers}).to(device).eval()


def with_value(value: Tensor, graph: Tensor) -> Tensor:
    """Returns `value`, bit for bit where it is finite, with the gradient of `graph`."""
    return value.detach() + (graph - graph.detach())


def code_with_gradient(
    sae: SAE, rows: Tensor, codes: Sequence[tuple[slice, Code]], starts: Tensor | None
) -> Tensor:
    """Computes the dense code [n, d_sae] with its gradient to rows [n, d_in].

    Args:
        sae: from `frozen_twin`.
        codes: the code of the rows in blocks, as `SAE.codes` gives it.
        starts: of the runs of tokens in the rows, for an SAE that needs them.
    """
    value = torch.cat([code.dense() for _, code in codes])
    centred = normalise_rows(rows, sae.row_norm) / sae.scale - sae.encoder_centre
    u = centred if sae.scaling is None else sae.scaling.apply(centred)
    if sae.activation.uses_weights:
        return with_value(value, sae.activation.encode(u, sae.weights()).dense())
    z = linear(u, sae.W_enc, sae.b_enc)
    if any(code.support is None for _, code in codes):
        context = (starts,) if sae.needs_contexts else ()
        return with_value(value, sae.activation.dense(z, *context))
    return with_value(value, torch.cat([_at_support(sae, z[part], code) for part, code in codes]))


def _at_support(sae: SAE, z: Tensor, code: Code) -> Tensor:
    """Returns the dense code of pre-activations z [n, d_sae] at the support of a code."""
    assert code.support is not None
    pre = z.flatten().index_select(0, code.support.flat)
    return Code(sae.activation.at(pre, code.support), pre, code.support).dense()


def reconstruction(sae: SAE, f: Tensor, rows: Tensor) -> Tensor:
    """Computes the reconstruction [n, d_out] of a dense code, as `SAE.decode` and `SAE.complete`
    do, with gradients to the code [n, d_sae] and to the rows [n, d_in]."""
    x_hat = restore_rows((f @ sae.W_dec + sae.b_dec) * sae.out_scale, rows, sae.row_norm)
    if sae.W_skip is None:
        return x_hat
    return x_hat + linear(rows / sae.scale - sae.encoder_centre, sae.W_skip) * sae.out_scale


def difference(sae: SAE, change: Tensor, rows: Tensor) -> Tensor:
    """Computes what a change of the code [n, d_sae] adds to the reconstruction; exactly 0 in rows
    without one."""
    added = (change @ sae.W_dec) * sae.out_scale
    if sae.row_norm == "none":
        return added
    restored = (restore_rows(part, rows, sae.row_norm) for part in (added, torch.zeros_like(added)))
    return torch.sub(*restored)
