"""The temperature tau of idea A: how strongly a variance scales what it scales.

    fixed              tau
    annealed           tau_end + (tau - tau_end) exp(-rate u),   u the share of the run done
    learned            tau a softplus parameter, started at tau
    learned_schedule   as annealed, tau_end and rate softplus parameters

The share is a buffer that the owner moves on in its `update`, so that a saved SAE keeps the
temperature with which it ended.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor, nn
from torch.nn.functional import softplus

from saelab.errors import SettingError
from saelab.parts.base import PartConfig, Scalar, Stored, inverse_softplus

Schedule = Literal["fixed", "annealed", "learned", "learned_schedule"]


class TemperatureFields(PartConfig):
    """Settings of a temperature, shared by the parts that have one.

    Args:
        tau: the temperature, or where it starts.
        temperature: its course from there.
        tau_end, rate: of the annealed forms.
        tau_lr: learning rate of its parameters.
    """

    tau: NonNegativeFloat = 0.5
    temperature: Schedule = "fixed"
    tau_end: NonNegativeFloat = 0.0
    rate: NonNegativeFloat = 5.0
    tau_lr: PositiveFloat = 1e-2

    @property
    def temperature_scalar(self) -> Scalar:
        """The declaration of 'tau' in the log."""
        return Scalar("temperature of the variance")

    @property
    def schedule_scalars(self) -> dict[str, Scalar]:
        """The declarations of a learned schedule's scalars."""
        if self.temperature != "learned_schedule":
            return {}
        return {
            "tau_end": Scalar("temperature that the schedule falls to", reported=False),
            "tau_rate": Scalar("rate at which the temperature falls", reported=False),
        }


class Temperature(nn.Module):
    """The temperature at the present share of the run; `tau()` has gradients where it is learned.

    Raises: SettingError when a softplus parameter would have to start at 0.
    """

    share: Tensor
    start: Tensor
    end: Tensor

    def __init__(self, config: TemperatureFields) -> None:
        super().__init__()
        self.config, self.lr = config, config.tau_lr
        self.register_buffer("share", torch.zeros((), dtype=torch.float32))
        start = torch.tensor(config.tau, dtype=torch.float32)
        end = torch.tensor(config.tau_end, dtype=torch.float32)
        self.register_buffer("start", start, persistent=False)
        self.register_buffer("end", end, persistent=False)
        if config.temperature == "learned":
            self.raw_tau = nn.Parameter(_raw_start("tau", config.tau))
        if config.temperature == "learned_schedule":
            self.raw_end = nn.Parameter(_raw_start("tau_end", config.tau_end))
            self.raw_rate = nn.Parameter(_raw_start("rate", config.rate))

    def tau(self) -> Tensor:
        """The temperature in force; 0-dim float32."""
        c = self.config
        if c.temperature == "fixed":
            return self.start
        if c.temperature == "learned":
            return softplus(self.raw_tau)
        end, rate = self.end, self.share.new_tensor(c.rate)
        if c.temperature == "learned_schedule":
            end, rate = softplus(self.raw_end), softplus(self.raw_rate)
        return end + (self.start - end) * torch.exp(-rate * self.share)

    def move_on(self, step: int, steps: int) -> None:
        """Sets the share of the run to that after the given step."""
        self.share.fill_((step + 1) / steps)

    def learned(self) -> dict[str, nn.Parameter]:
        """Returns the learned scalars, see `Part.learned`."""
        names = {"raw_tau": "tau", "raw_end": "tau_end", "raw_rate": "tau_rate"}
        return {names[name]: parameter for name, parameter in self.named_parameters()}

    def stored(self) -> dict[str, tuple[Stored, ...]]:
        """Returns the places of tau, the temperature in force, see `Part.stored`."""
        if self.config.temperature == "learned":
            return {"tau": (Stored(self.raw_tau, "softplus"),)}
        if self.config.temperature == "learned_schedule":
            return {"tau": (Stored(self.start), Stored(self.raw_end, "softplus"))}
        return {"tau": (Stored(self.start), Stored(self.end))}

    def scalars(self) -> dict[str, float]:
        values = {"tau": float(self.tau().detach())}
        if self.config.temperature == "learned_schedule":
            values |= {
                "tau_end": float(softplus(self.raw_end.detach())),
                "tau_rate": float(softplus(self.raw_rate.detach())),
            }
        return values


def _raw_start(name: str, value: float) -> Tensor:
    if value <= 0:
        raise SettingError(name, value, "is learned and can't start at 0: use a positive value")
    return inverse_softplus(torch.tensor(value, dtype=torch.float64)).float()
