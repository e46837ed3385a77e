"""Devices that no machine of ours has: MPS and GPUs of a ROCm build.

MPS is stood in for by the device 'meta', which has shapes and dtypes and no numbers, so that what
is asked of a device is seen: which kernels, and no float64. Nothing here ran on such hardware.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from saelab.data.devices import check_device
from saelab.errors import SettingError
from saelab.kernels import eager, functions, native, table
from saelab.parts.published import PRESETS
from saelab.sae import SAE, SAEConfig
from saelab.seeding import torch_stream

MPS, META, CUDA = (torch.device(name) for name in ("mps", "meta", "cuda"))
#: What torch says of `tensor.to("mps")`.
REFUSAL = "Cannot convert a MPS Tensor to float64 dtype as MPS does not support it"
#: Published SAEs whose code has a size that does not depend on numbers, which 'meta' has not.
FIXED = ("topk", "multi_topk", "groupmax", "abs_topk", "jumprelu_quadratic")
#: Published SAEs that encode in float64.
IN_FLOAT64 = ("feature_choice",)


class NoFloat64(TorchDispatchMode):
    """Refuses float64 tensors of a kind of device, as MPS does; counts the operations there."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.operations = kind, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        out = function(*args, **kwargs or {})
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == self.kind:
                self.operations += 1
                assert leaf.dtype != torch.float64, function
        return out


def refuse_float64(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype == torch.float64:
        raise TypeError(REFUSAL)
    return tensor.to("meta")


def published(preset: str) -> SAE:
    return SAEConfig.parse({"d_sae": 64, "preset": preset}).build(16).eval()


@pytest.mark.parametrize("name", ["mps", "mps:0"])
def test_a_study_on_mps_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(SettingError, match="in float64, which MPS does not have: use 'cpu'"):
        check_device(name)


def test_a_device_of_rocm_is_named_cuda() -> None:
    with pytest.raises(SettingError, match="of a ROCm build like those of CUDA: use 'cuda'"):
        check_device("hip")


@pytest.mark.parametrize("device", [MPS, META], ids=str)
def test_other_devices_take_eager_kernels_and_float32(
    device: torch.device, capsys: pytest.CaptureFixture[str]
) -> None:
    assert table.kernels_for(device) is eager
    assert table.kernels_name(device) == "eager (the only ones for this device)"
    assert table.selection_dtype("auto", device) == torch.float32
    assert not capsys.readouterr().err


def test_rocm_takes_eager_kernels_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "eager_requested", lambda: False)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    table._cuda_kernels.cache_clear()
    try:
        assert table.kernels_for(CUDA) is eager
        assert "torch is built for ROCm" in table.kernels_name(CUDA)
    finally:
        table._cuda_kernels.cache_clear()


@pytest.mark.parametrize("preset", FIXED)
def test_an_sae_encodes_and_decodes_without_float64(preset: str) -> None:
    sae = published(preset)._apply(refuse_float64)
    with NoFloat64("meta") as seen, torch.no_grad():
        code = sae.encode(torch.empty(32, 16, device="meta"))
        assert sae.decode(code).shape == (32, 16)
    assert seen.operations > 5


@pytest.mark.parametrize("preset", PRESETS)
def test_the_eager_kernels_encode_in_float64_for_one_published_sae_alone(
    preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functions, "kernels_for", lambda device: eager)
    sae, x = published(preset), torch.randn(64, 16, generator=torch_stream(0, "rows"))
    sae.initialise(x, seed=0)
    fails = pytest.raises(AssertionError) if preset in IN_FLOAT64 else nullcontext()
    with fails, NoFloat64("cpu") as seen, torch.no_grad():
        sae.decode(sae.encode(x, torch.tensor([0, 32, 64])))
    assert seen.operations > 3


@pytest.mark.parametrize("preset", PRESETS)
def test_an_sae_moves_as_a_whole_or_not_at_all(preset: str) -> None:
    sae = published(preset)
    has_float64 = any(buffer.dtype == torch.float64 for buffer in sae.buffers())
    if has_float64:
        with pytest.raises(SettingError, match="device = 'mps'.* leave the SAE on 'cpu'"):
            sae._apply(refuse_float64)
    else:
        sae._apply(refuse_float64)
    places = {t.device.type for t in (*sae.parameters(), *sae.buffers())}
    assert places == ({"cpu"} if has_float64 else {"meta"})


def test_conversions_within_the_cpu_are_as_before() -> None:
    sae = published("topk").double()
    assert sae.W_enc.dtype == torch.float64
    assert sae.float().W_enc.dtype == torch.float32
