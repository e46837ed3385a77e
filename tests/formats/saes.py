"""What the tests of formats share: SAEs of every part, rows to try them on, a comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from saelab.checks.boundaries import near_a_boundary
from saelab.data.activations.stream import Batch
from saelab.sae import SAE, SAEConfig
from saelab.seeding import torch_stream
from saelab.training.loop import Cell
from saelab.training.optim import TrainConfig

D_IN, D_SAE, N = 6, 24, 200
#: Relative to the largest value.
TOLERANCE = 1e-5
#: Rows with a pre-activation so near to where it switches are left out: rounding decides there.
NEAR = 1e-4


def rows(seed: int, n: int = N, d: int = D_IN) -> Tensor:
    """Raw activations with a mean and unlike variances; float32 [n, d]."""
    drawn = torch.randn(n, d, generator=torch_stream(seed, "rows of the formats' tests"))
    return 4 + drawn * torch.linspace(0.5, 3, d)


def trained(seed: int = 0, steps: int = 3, **config: Any) -> SAE:
    """A few steps on `rows`, so that biases, statistics and scalars are not those of the start."""
    parts = {"d_sae": D_SAE, "losses": ["reconstruction"], "controllers": [], **config}
    return trained_sae(SAEConfig.parse(parts), seed, steps)


def trained_sae(config: SAEConfig, seed: int = 0, steps: int = 3) -> SAE:
    """`trained`, of whole settings."""
    x = rows(seed)
    training = TrainConfig(tokens=steps * N, batch_size=N, lr=1e-2)
    cell = Cell("c", config, training, x, seed)
    for _ in range(steps):
        cell.step(Batch(x, torch.arange(N) % 20, segments=torch.arange(N) // 20))
    return cell.sae.eval()


def clear(sae: SAE, x: Tensor) -> Tensor:
    """The rows whose code no rounding can switch."""
    return x[~near_a_boundary(sae, x, NEAR).any(1)]


def same(found: Tensor, wanted: Tensor) -> None:
    """Equal to `TOLERANCE` of the largest value."""
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) <= TOLERANCE * float(wanted.abs().max())


def same_function(a: SAE, b: SAE, x: Tensor, unit: float = 1.0) -> None:
    """Code and reconstruction, along the dense path and the sparse one; b's code times `unit`."""
    x = clear(b, x)
    assert len(x) > N // 2
    f = b.encode(x)
    assert bool((f > 0).any())
    same(a.encode(x), f * unit)
    same(a.decode(a.encode(x)), b.decode(f))
    for part, code in a.codes(x):
        same(code.dense(), f[part] * unit)
        same(a.decode_code(code), b.decode(f[part]))


def random_weights(seed: int, *names: str) -> dict[str, Tensor]:
    """SAELens' tensors by name, encoder [d_in, d_sae]."""
    shapes = {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    stream = torch_stream(seed, "weights of the formats' tests")
    return {n: torch.randn(shapes.get(n, (D_SAE,)), generator=stream) for n in names}


def write(folder: Path, config: Any, weights: str, tensors: dict[str, Tensor]) -> Path:
    """A directory with cfg.json and one file of tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / weights)
    return folder
