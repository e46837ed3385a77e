"""A cell whose SAE is the user's own torch module: slower, but compared in pairs like all others.

The module is made by a callable (d_in, d_sae, seed) and has

    encode(x [n, d_in]) -> code [n, d_sae],  decode(f) -> x_hat [n, d_in],  loss(x) -> scalar

in raw activation space. Everything else (batches, schedule, log, evaluation) is done as for other
cells. A checkpoint holds the module's parameters and buffers, and its attributes that are numbers,
tensors or torch generators; it must keep running state nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn

from saelab.data.activations.stream import Batch
from saelab.distributed.sharded_file import WHOLE, Shards
from saelab.errors import CellFailure, SettingError
from saelab.training.cell import TrainingCell
from saelab.training.optim import TrainConfig
from saelab.training.sample import Sample
from saelab.training.state import State


@final
class ModuleCell(TrainingCell):
    """Trains the module `build(d_in, d_sae, seed)` on its own loss with Adam.

    Raises: SettingError when the module lacks encode, decode or loss, or has nothing to train.
    """

    def __init__(
        self,
        name: str,
        build: Callable[..., Any],
        d_sae: int,
        config: TrainConfig,
        sample: Tensor | Sample,
        seed: int,
    ) -> None:
        sample = Sample.of(sample)
        if sample.y is not None:
            remedy = (
                "trains on loss(x) alone, which does not get the targets: leave target_hook out"
            )
            raise SettingError(f"{name}: module", getattr(build, "__name__", repr(build)), remedy)
        d_in = sample.x.shape[1]
        module = build(d_in, d_sae, seed)
        for method in ("encode", "decode", "loss"):
            if not callable(getattr(module, method, None)):
                raise SettingError(f"{name}: module", type(module).__name__, f"needs {method}(x)")
        module.d_in, module.d_sae = d_in, d_sae
        module = module.to(sample.device).train()
        super().__init__(name, module, config, sample.device)
        parameters = [p for p in module.parameters() if p.requires_grad]
        if not parameters:
            raise SettingError(f"{name}: module", type(module).__name__, "has nothing to train")
        self.parameters = parameters
        self.adam = torch.optim.Adam(parameters, lr=config.lr, betas=config.betas, fused=True)

    def shards(self) -> Shards:
        """Returns that no tensor is split: a module is trained in one process."""
        return WHOLE

    def scalar_distance(self) -> dict[str, float]:
        """Returns nothing: which scalars of a module are learned is not known."""
        return {}

    def scalar_reach(self) -> dict[str, float]:
        """Returns nothing: which scalars of a module are learned is not known."""
        return {}

    def _add_training_state(self, state: State) -> None:
        for i, moments in self.adam.state_dict()["state"].items():
            state.add(f"adam/{i}", State(moments))

    def _restore_training_state(self, state: State) -> None:
        moments: dict[int, dict[str, Tensor]] = {}
        for name, moment in state.part("adam").tensors.items():
            i, _, which = name.partition("/")
            moments.setdefault(int(i), {})[which] = moment
        groups = self.adam.state_dict()["param_groups"]
        self.adam.load_state_dict({"state": moments, "param_groups": groups})

    def _drop_gradients(self) -> None:
        self.adam.zero_grad(set_to_none=True)

    def _step(self, batch: Batch) -> dict[str, float]:
        """Takes one optimiser step on the module's own loss."""
        x = self.rows(batch).x
        x = x.clone() if x.is_inference() else x  # the module's own loss may record it
        loss = self.sae.loss(x)
        self._drop_gradients()
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip))
        total = float(loss.detach())
        if not math.isfinite(total) or not math.isfinite(norm):
            raise CellFailure(self.name, self.steps_done, f"loss {total}, gradient norm {norm}")
        for group in self.adam.param_groups:
            group["lr"] = self.config.lr * self.config.rate(self.steps_done)
        self.adam.step()
        record = {"loss": total, "grad_norm": norm}
        self.log.append(record)
        self.steps_done += 1
        self.tokens += len(x)
        return record
