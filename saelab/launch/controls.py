"""Control subjects of every study: what an idea is placed between.

    model channels    the residual stream's own channels, probed
    all zero          no latent fires and the reconstruction is zero
    top channels      the k channels in which x is farthest from the mean, k the target L0
    PCA               the same of its principal components
    linear map        of a target alone: the best linear map of all channels of the input, no
                      sparsity; what a transcoder must beat, and what a skip connection could do
    untrained         the baseline at its initialisation: a random dictionary at the target L0
    frozen decoder    the baseline trained without its decoder, which stays random
    twin              the baseline at fresh seeds: an arm without any difference (A/A twin)
    planted effect    the trained twin with every decoder row turned by `ANGLE`, so that FVU
                      worsens by a known amount

Where other activations y are reconstructed than are read, the second is decoded by the rows of that
linear map, and the third is the reduced-rank regression: the components of its predictions.

A row d_i is turned towards a random direction r_i at a right angle to it, so that with the
reconstruction x_hat = b + p, p = sum_i f_i d_i, the expected error is

    E|x - x_hat'|^2 = |x - b - cos(a) p|^2 + sin(a)^2 sum_i f_i^2 |d_i|^2
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from saelab import checkpoint
from saelab.evals.base import Row, Subject, number
from saelab.evals.core import CoreData, measure_reconstruction
from saelab.parts import FROZEN_DECODER
from saelab.runs.schema import FROZEN, PLANTED, UNTRAINED, CellId, control_arm
from saelab.sae import SAE, SAEConfig
from saelab.seeding import torch_stream
from saelab.study.plan import CellSpec
from saelab.training.sample import Sample

#: By which the planted effect turns decoder rows, in degrees. Our choice: on the embedded default
#: FVU then worsens by somewhat more than the smallest effect of interest.
ANGLE = 7.0
#: Rows on which the code of the untrained SAE is brought to the target L0 where it starts denser
#: than this relative distance. Our choice: few, since the code is dense.
L0_ROWS, L0_TOLERANCE = 2048, 0.05
#: Name of the control that a target has, and its ridge relative to the mean variance of a channel.
LINEAR, RIDGE = "linear map", 1e-6
#: Rows on which the planted effect's expected error is computed.
EXPECTED_ROWS = 2048


@dataclass(frozen=True)
class Setting:
    """Data and settings that a control may be made from.

    Args:
        sample: raw activations [n, d_in] of the training text, or with what is reconstructed.
        sae: settings of the baseline.
        level: target L0 in latents per token; 0 without one.
        seed: of the baseline's first cell.
    """

    sample: Tensor | Sample
    sae: SAEConfig
    level: float
    seed: int

    @property
    def rows(self) -> Sample:
        """The sample, with what is reconstructed."""
        return Sample.of(self.sample)

    @property
    def k(self) -> int:
        """Directions of a control's own: the target L0, else what the baseline's settings name,
        else an eighth of the channels."""
        width = self.rows.x.shape[1]
        return min(width, max(1, round(self.level or self.sae.target_l0 or width / 8)))


class Zero:
    """No latent ever fires."""

    def __init__(self, d_in: int, d_sae: int, d_out: int | None = None) -> None:
        self.d_in, self.d_sae, self.d_out = d_in, d_sae, d_out or d_in

    def encode(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), self.d_sae)

    def decode(self, f: Tensor) -> Tensor:
        return f.new_zeros(len(f), self.d_out)


class TopOfBasis:
    """x = mean + c B with orthonormal rows B [d_in, d_in]; the code is c at its k largest |c|."""

    def __init__(self, mean: Tensor, basis: Tensor, k: int) -> None:
        self.mean, self.basis, self.k = mean, basis, k
        self.d_in = self.d_sae = len(mean)

    def encode(self, x: Tensor) -> Tensor:
        c = (x - self.mean) @ self.basis.T
        kept = c.abs().topk(self.k, dim=1).indices
        return torch.zeros_like(c).scatter_(1, kept, c.gather(1, kept))

    def decode(self, f: Tensor) -> Tensor:
        return f @ self.basis + self.mean


class TopOfMap:
    """y = mean_y + c D with c = (x - mean_x) E; the code is c at its k largest |c|.

    Args:
        means: of x [d_in] and of y [d_out].
        encoder: E [d_in, m].
        decoder: D [m, d_out].
        k: entries of the code; m for all.
    """

    def __init__(
        self, means: tuple[Tensor, Tensor], encoder: Tensor, decoder: Tensor, k: int
    ) -> None:
        self.means, self.encoder, self.decoder, self.k = means, encoder, decoder, k
        self.d_in, self.d_sae = encoder.shape

    def encode(self, x: Tensor) -> Tensor:
        c = (x - self.means[0]) @ self.encoder
        if self.k >= self.d_sae:
            return c
        largest = c.abs().topk(self.k, dim=1).indices
        return torch.zeros_like(c).scatter_(1, largest, c.gather(1, largest))

    def decode(self, f: Tensor) -> Tensor:
        return f @ self.decoder + self.means[1]


class LargestEntries:
    """An SAE of whose code the entries below a threshold are left out."""

    def __init__(self, sae: SAE, threshold: float) -> None:
        self.sae, self.threshold = sae, threshold
        self.d_in, self.d_sae = sae.d_in, sae.d_sae

    def encode(self, x: Tensor) -> Tensor:
        f = self.sae.encode(x)
        return f.where(f.abs() >= self.threshold, 0.0)

    def decode(self, f: Tensor) -> Tensor:
        return self.sae.decode(f)

    def complete(self, x_hat: Tensor, x: Tensor) -> Tensor:
        return self.sae.complete(x_hat, x)


def linear_map(sample: Sample) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Returns the means of x and y, and the least-squares map [d_in, d_out] between them; float32.

    A ridge of `RIDGE` of the mean variance keeps channels that never vary out of it.
    """
    means = sample.x.mean(0), sample.target.mean(0)
    x, y = ((t - m).double() for t, m in zip((sample.x, sample.target), means, strict=True))
    gram = x.T @ x
    ridge = RIDGE * float(gram.diagonal().mean()) * torch.eye(len(gram), dtype=gram.dtype)
    return means, torch.linalg.solve(gram + ridge.to(gram), x.T @ y).to(sample.x)


def linear_subject(sample: Sample) -> TopOfMap:
    """Returns the least-squares map of all channels as a subject."""
    means, w = linear_map(sample)
    return TopOfMap(means, torch.eye(len(w), device=w.device, dtype=w.dtype), w, len(w))


def _linear(of: Setting) -> Subject:
    return linear_subject(of.rows)


def _zero(of: Setting) -> Subject:
    return Zero(of.rows.x.shape[1], of.sae.d_sae, of.rows.target.shape[1])


def _top_channels(of: Setting) -> Subject:
    if of.rows.y is not None:
        whole = linear_subject(of.rows)
        return TopOfMap(whole.means, whole.encoder, whole.decoder, of.k)
    mean = of.rows.x.mean(0)
    return TopOfBasis(mean, torch.eye(len(mean), device=mean.device, dtype=torch.float32), of.k)


def _pca(of: Setting) -> Subject:
    if of.rows.y is not None:
        means, w = linear_map(of.rows)
        predicted = ((of.rows.x - means[0]) @ w).double()
        vectors = torch.linalg.eigh(predicted.T @ predicted)[1].flip(1).to(w)
        return TopOfMap(means, w @ vectors, vectors.T.contiguous(), min(of.k, vectors.shape[1]))
    mean = of.rows.x.mean(0)
    centred = (of.rows.x - mean).double()
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    return TopOfBasis(mean, vectors.T.flip(0).to(mean), of.k)


def _untrained(of: Setting) -> Subject:
    config, level = of.sae, of.level or of.sae.target_l0
    if level and config.activation.takes_initial_l0:
        config = config.patched({"initial_l0": level})
    sample = of.rows
    sae = config.build(sample.d_in, 1, of.seed, d_out=sample.d_out)
    sae.to(sample.device).initialise(sample.x, of.seed, sample.y)
    sae.eval()
    return sae if sae.needs_contexts or not level else _at_l0(sae, sample.x[:L0_ROWS], level)


def _at_l0(sae: SAE, rows: Tensor, level: float) -> Subject:
    """The SAE, without the smaller entries of its code where it starts denser than the level: a k
    that training moves or a threshold that it learns is not there yet."""
    code = sae.encode(rows)
    if float((code != 0).sum()) / len(rows) <= (1 + L0_TOLERANCE) * level:
        return sae
    entries, kept = code.abs().flatten(), max(1, round(level * len(rows)))
    return LargestEntries(sae, float(entries.kthvalue(len(entries) - kept + 1).values))


#: Name -> how a control is made that needs no training; every evaluation takes it. The model's
#: channels are probed without being a subject.
SUBJECTS: dict[str, Callable[[Setting], Subject]] = {
    "all zero": _zero,
    "top channels": _top_channels,
    "PCA": _pca,
    UNTRAINED: _untrained,
}
#: Those of a launch with a target alone: of an SAE the map would be the identity.
OF_TARGETS: dict[str, Callable[[Setting], Subject]] = {LINEAR: _linear}


def subjects(has_target: bool) -> dict[str, Callable[[Setting], Subject]]:
    """Returns the controls of a launch that need no training."""
    return SUBJECTS | OF_TARGETS if has_target else SUBJECTS


def frozen_spec(baseline: CellSpec) -> CellSpec:
    """The baseline's cell with a decoder that stays random; nothing resets its rows."""
    others = [part for part in baseline.sae.constraints if not part.moves_decoder]
    changes: dict[str, Any] = {"constraints": [*others, FROZEN_DECODER], "observers": []}
    changes["decoder_start"] = "random"
    cell = replace(baseline.id, arm=control_arm(FROZEN))
    return replace(baseline, id=cell, sae=baseline.sae.patched(changes), expected=())


# ---- the planted effect ----------------------------------------------------------------------


@torch.no_grad()
def turn_decoder(sae: SAE, seed: int, degrees: float = ANGLE) -> SAE:
    """A copy of an SAE whose decoder rows are turned, each towards its own random direction.

    Args:
        seed: directions come from its named stream 'planted'.
    """
    copied = copy.deepcopy(sae)
    w = copied.W_dec
    draw = torch.randn(w.shape, generator=torch_stream(seed, "planted"), dtype=torch.float32).to(w)
    unit = normalize(w, dim=1)
    across = normalize(draw - (draw * unit).sum(1, keepdim=True) * unit, dim=1)
    a = math.radians(degrees)
    length = w.norm(dim=1, keepdim=True)
    if copied.config.tied:  # the encoder stays as it was
        copied.W_enc = torch.nn.Parameter(w.detach().clone())
    w.copy_(length * (math.cos(a) * unit + math.sin(a) * across))
    return copied


@torch.no_grad()
def expected_fvu_change(
    sae: SAE,
    x: Tensor,
    degrees: float = ANGLE,
    y: Tensor | None = None,
    weights: Tensor | None = None,
) -> float:
    """Expected rise of FVU by `turn_decoder` on rows x [n, d_in], over the draw of directions.

    Args:
        y: what is reconstructed, [n, d_out]; None for x.
        weights: of the channels of several hook points in FVU, [d_out]; None for equal ones.
    """
    a, f = math.radians(degrees), sae.encode(x)
    y, equal = x if y is None else y, weights is None
    weights = torch.ones_like(y[0]) if weights is None else weights.to(y)
    origin = sae.decode(torch.zeros_like(f[:1]))
    p, b = sae.decode(f) - origin, sae.complete(origin, x)
    before = ((y - b - p).square() * weights).sum()
    if equal:
        raw = sae.W_dec.norm(dim=1) * sae.out_scale  # the decoder works in normalised space
    else:  # a random direction at a right angle to u has E[v_j^2] = (1 - u_j^2) / (d - 1)
        left = (1 - normalize(sae.W_dec, dim=1).square()) / (sae.d_out - 1)
        raw = sae.W_dec.norm(dim=1) * (left @ (weights * sae.out_scale.square())).sqrt()
    after = ((y - b - math.cos(a) * p).square() * weights).sum()
    spread = math.sin(a) ** 2 * ((f * raw) ** 2).sum()
    power = ((y - y.mean(0)).square() * weights).sum()
    return float((after + spread - before) / power)


def planted_rows(sae: SAE, data: CoreData, seed: int) -> list[Row]:
    """FVU and L0 of the turned SAE on all held-out rows, and by how much FVU should worsen."""
    found = measure_reconstruction(turn_decoder(sae, seed), data)
    rows, y = (t[:EXPECTED_ROWS].to(data.device) for t in (data.rows[0], data.targets))
    change = expected_fvu_change(sae, rows, y=y, weights=data.weights)
    return [
        number("fvu", found.fvu, data.definition),
        number("explained_variance", 1 - found.fvu, data.definition),
        number("l0", found.l0, data.definition),
        number("planted.expected_fvu_change", change, "planted/1"),
    ]


def plant_effect(folder: Path, data: CoreData, baseline: CellId) -> dict[str, Any]:
    """The content of a control's cell.json, from the folder of a trained baseline cell."""
    sae, _ = checkpoint.load(folder, data.device)
    rows = planted_rows(sae, data, baseline.seed)
    cell = replace(baseline, arm=control_arm(PLANTED))
    return {"rows": [row.of_cell(cell).as_dict() for row in rows]}
