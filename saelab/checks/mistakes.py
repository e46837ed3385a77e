"""Mistakes that checks find in parts, and comparisons of results."""

from __future__ import annotations

import torch
from torch import Tensor


class PartMistake(Exception):
    """A rule of parts that a part breaks.

    Args:
        what: what it does, as a sentence without an end.
        remedy: what to do about it.
    """

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(f"{what}: {remedy}")
        self.what, self.remedy = what, remedy


def require(right: bool, what: str, remedy: str) -> None:
    """Raises: PartMistake unless it is right."""
    if not right:
        raise PartMistake(what, remedy)


def snapshot(module: torch.nn.Module) -> dict[str, Tensor]:
    """Returns copies of all parameters and buffers by name."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Returns the names of tensors that are not equal bit by bit; a NaN, which stands for 'not
    yet', equals itself."""
    names = set(a) ^ set(b)
    for name in set(a) & set(b):
        if not torch.equal(a[name].nan_to_num(nan=-7.5), b[name].nan_to_num(nan=-7.5)):
            names.add(name)
    return sorted(names)


def distance(values: Tensor, expected: Tensor) -> float:
    """Returns the largest distance of a row from its expected value, relative to the row's norm, or
    to a hundredth of the mean norm for a row that all but cancels. A vector is one row."""
    values, expected = torch.atleast_1d(values.detach()), torch.atleast_1d(expected.detach())
    if not values.numel():
        return 0.0
    values, expected = (t.reshape(-1, t.shape[-1]) for t in (values, expected))
    norms = torch.linalg.vector_norm(expected, dim=1)
    scale = norms.clamp_min(0.01 * float(norms.mean())).clamp_min(1e-25)
    return float(((values - expected).norm(dim=1) / scale).max())
