"""Control subjects of every study: what an idea is placed between.

    model channels    the residual stream's own channels, probed
    all zero          no latent fires and the reconstruction is zero
    top channels      the k channels in which x is farthest from the mean, k the target L0
    PCA               the same of its principal components
    untrained         the baseline at its initialisation: a random dictionary at the target L0
    frozen decoder    the baseline trained without its decoder, which stays random
    twin              the baseline at fresh seeds: an arm without any difference (A/A twin)
    planted effect    the trained twin with every decoder row turned by `ANGLE`, so that FVU
                      worsens by a known amount

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
from saelab.evals.core import DEFINITION, CoreData, measure_reconstruction
from saelab.parts import FROZEN_DECODER
from saelab.runs.schema import FROZEN, PLANTED, CellId, control_arm
from saelab.sae import SAE, SAEConfig
from saelab.seeding import torch_stream
from saelab.study.plan import CellSpec

#: By which the planted effect turns decoder rows, in degrees. Our choice: on the embedded default
#: FVU then worsens by somewhat more than the smallest effect of interest.
ANGLE = 7.0
#: Rows on which the code of the untrained SAE is brought to the target L0 where it starts denser
#: than this relative distance. Our choice: few, since the code is dense.
L0_ROWS, L0_TOLERANCE = 2048, 0.05
#: Rows on which the planted effect's expected error is computed.
EXPECTED_ROWS = 2048


@dataclass(frozen=True)
class Setting:
    """Data and settings that a control may be made from.

    Args:
        sample: raw activations [n, d_in] of the training text.
        sae: settings of the baseline.
        level: target L0 in latents per token; 0 without one.
        seed: of the baseline's first cell.
    """

    sample: Tensor
    sae: SAEConfig
    level: float
    seed: int

    @property
    def k(self) -> int:
        """Directions of a control's own: the target L0, else what the baseline's settings name,
        else an eighth of the channels."""
        width = self.sample.shape[1]
        return min(width, max(1, round(self.level or self.sae.target_l0 or width / 8)))


class Zero:
    """No latent ever fires."""

    def __init__(self, d_in: int, d_sae: int) -> None:
        self.d_in, self.d_sae = d_in, d_sae

    def encode(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), self.d_sae)

    def decode(self, f: Tensor) -> Tensor:
        return f.new_zeros(len(f), self.d_in)


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


def _zero(of: Setting) -> Subject:
    return Zero(of.sample.shape[1], of.sae.d_sae)


def _top_channels(of: Setting) -> Subject:
    mean = of.sample.mean(0)
    return TopOfBasis(mean, torch.eye(len(mean), device=mean.device, dtype=torch.float32), of.k)


def _pca(of: Setting) -> Subject:
    mean = of.sample.mean(0)
    centred = (of.sample - mean).double()
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    return TopOfBasis(mean, vectors.T.flip(0).to(mean), of.k)


def _untrained(of: Setting) -> Subject:
    config, level = of.sae, of.level or of.sae.target_l0
    if level:
        config = config.patched({"initial_l0": level})
    sae = config.build(of.sample.shape[1], 1, of.seed)
    sae.to(of.sample.device).initialise(of.sample, of.seed)
    sae.eval()
    return sae if sae.needs_contexts or not level else _at_l0(sae, of.sample[:L0_ROWS], level)


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
    "untrained": _untrained,
}


def frozen_spec(baseline: CellSpec) -> CellSpec:
    """The baseline's cell with a decoder that stays random; nothing resets its rows."""
    others = [part for part in baseline.sae.constraints if not part.moves_decoder]
    changes: dict[str, Any] = {"constraints": [*others, FROZEN_DECODER], "observers": []}
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
def expected_fvu_change(sae: SAE, x: Tensor, degrees: float = ANGLE) -> float:
    """Expected rise of FVU by `turn_decoder` on rows x [n, d_in], over the draw of directions."""
    a, f = math.radians(degrees), sae.encode(x)
    b = sae.decode(torch.zeros_like(f[:1]))
    p = sae.decode(f) - b
    before = (x - b - p).square().sum()
    raw = sae.W_dec.norm(dim=1) * sae.scale  # the decoder works in normalised space
    after = (x - b - math.cos(a) * p).square().sum()
    spread = math.sin(a) ** 2 * ((f * raw) ** 2).sum()
    return float((after + spread - before) / (x - x.mean(0)).square().sum())


def planted_rows(sae: SAE, data: CoreData, seed: int) -> list[Row]:
    """FVU and L0 of the turned SAE on all held-out rows, and by how much FVU should worsen."""
    found = measure_reconstruction(turn_decoder(sae, seed), data)
    rows = data.rows[0][:EXPECTED_ROWS].to(data.device)
    return [
        number("fvu", found.fvu, DEFINITION),
        number("explained_variance", 1 - found.fvu, DEFINITION),
        number("l0", found.l0, DEFINITION),
        number("planted.expected_fvu_change", expected_fvu_change(sae, rows), "planted/1"),
    ]


def plant_effect(folder: Path, data: CoreData, baseline: CellId) -> dict[str, Any]:
    """The content of a control's cell.json, from the folder of a trained baseline cell."""
    sae, _ = checkpoint.load(folder, data.device)
    rows = planted_rows(sae, data, baseline.seed)
    cell = replace(baseline, arm=control_arm(PLANTED))
    return {"rows": [row.of_cell(cell).as_dict() for row in rows]}
