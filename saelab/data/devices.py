"""Devices that models and SAEs run on."""

from __future__ import annotations

import torch

from saelab.errors import SettingError

#: Devices that settings may name.
NAMES = "'cpu' or 'cuda'"
#: Kind of device -> why no study runs on it, and what to name instead.
REASONS = {
    "mps": "studies compute sums and thresholds in float64, which MPS does not have",
    "hip": "torch names the GPUs of a ROCm build like those of CUDA",
}
REMEDIES = {"mps": "'cpu'", "hip": "'cuda'"}


def check_device(name: str, setting: str = "model.device") -> None:
    """Raises: SettingError for a device that is not supported or that this machine lacks."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SettingError(setting, name, "no such device: use 'cpu' or 'cuda'") from None
    if device.type not in ("cpu", "cuda"):
        reason = REASONS.get(device.type, f"{device.type!r} is not supported")
        remedy = f"{reason}: use {REMEDIES.get(device.type, NAMES)}"
        raise SettingError(setting, name, remedy)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and not count:
        raise SettingError(setting, name, "this machine has no CUDA device: use 'cpu'")
    if (device.index or 0) >= (count if device.type == "cuda" else 1):
        remedy = f"this machine has no such device: use {device.type}:0"
        raise SettingError(setting, name, remedy)
