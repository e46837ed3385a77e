"""Training and measuring give the same bits whatever the process has set in torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from ambient import torch_defaults
from safetensors.torch import save_file
from torch import Tensor, nn

import saelab
from saelab.data.activations.stream import Batch
from saelab.runtime.torch_defaults import standard_torch
from saelab.seeding import torch_stream
from saelab.training.loop import train
from saelab.training.module_cell import ModuleCell
from saelab.training.optim import TrainConfig

#: Metrics whose sums over many rows would show another number of threads.
ROWS, WIDTH = 8192, 24


@contextmanager
def gradients_off() -> Iterator[None]:
    with torch.set_grad_enabled(False):
        yield


@contextmanager
def less_precise_products() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def several_threads() -> Iterator[None]:
    torch.set_num_threads(3)
    try:
        yield
    finally:
        torch.set_num_threads(1)


AMBIENT: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "float64": lambda: torch_defaults(torch.float64),
    "bfloat16": lambda: torch_defaults(torch.bfloat16),
    "meta": lambda: torch_defaults(torch.float32, "meta"),
    "gradients off": gradients_off,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "less precise products": less_precise_products,
    "several threads": several_threads,
}


def settings(folder: Path) -> dict[str, Any]:
    return {
        "activations": str(folder),
        "sae": {"d_sae": 96, "activation": "relu", "scaling": "variance", "initial_l0": 4},
        "train": {"tokens": 4096, "batch_size": 2048},
        "evaluation": {"tokens": 2048},
    }


@pytest.fixture(scope="module")
def activations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("activations")
    for i in range(2):
        x = torch.randn(ROWS, WIDTH, generator=torch_stream(i, "test rows"))
        save_file({"x": x}, folder / f"part-{i}.safetensors")
    return folder


def run(folder: Path, cache: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    sae = saelab.train(settings(folder), cache=cache)
    return sae.state_dict(), saelab.evaluate(sae, settings(folder), ["core"], cache=cache)


@pytest.fixture(scope="module")
def expected(
    activations: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Tensor], dict[str, float]]:
    return run(activations, tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("ambient", AMBIENT)
def test_training_and_measuring_ignore_the_settings_of_the_process(
    activations: Path,
    expected: tuple[dict[str, Tensor], dict[str, float]],
    tmp_path: Path,
    ambient: str,
) -> None:
    with AMBIENT[ambient]():
        weights, scores = run(activations, tmp_path)
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected[0].items())
    assert scores == expected[1]


@pytest.mark.parametrize("ambient", AMBIENT)
def test_the_settings_of_the_process_are_restored(ambient: str) -> None:
    def state() -> list[Any]:
        switches = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        device = torch.get_default_device(), torch.is_autocast_enabled("cpu")
        precision = torch.get_float32_matmul_precision()
        return [*switches, *device, precision, torch.get_default_dtype(), torch.get_num_threads()]

    with AMBIENT[ambient]():
        before = state()
        with standard_torch():
            inside = state()
        assert state() == before
    plain = [True, False, torch.device("cpu"), False, "highest", torch.float32]
    assert inside[:-1] == plain
    with pytest.raises(RuntimeError, match="as raised"), standard_torch():
        raise RuntimeError("as raised")


class OwnModule(nn.Module):
    """A user's autoencoder whose loss records the rows themselves."""

    def __init__(self, d_in: int, d_sae: int, seed: int) -> None:
        super().__init__()
        draw = torch.randn(d_in, d_sae, generator=torch_stream(seed, "own"))
        self.w = nn.Parameter(0.1 * draw)

    def encode(self, x: Tensor) -> Tensor:
        return (x @ self.w).relu()

    def decode(self, f: Tensor) -> Tensor:
        return f @ self.w.T

    def loss(self, x: Tensor) -> Tensor:
        return (self.decode(self.encode(x)) - x).square().mean()


def test_an_own_module_trains_on_rows_that_were_made_in_inference_mode() -> None:
    config = TrainConfig(tokens=64, batch_size=32)
    with torch.inference_mode():
        x = torch.randn(32, 8, generator=torch_stream(0, "test rows"))
        with torch.inference_mode(False):
            cell = ModuleCell("own", OwnModule, 16, config, torch.randn(64, 8), 0)
        before = cell.sae.w.clone()
        failures = train([cell], [(Batch(x, torch.arange(32)), None)] * 2)
    assert not failures and cell.done and not torch.equal(cell.sae.w, before)
