"""saelab: trains sparse autoencoder variants side by side and says honestly whether they help.

Importing it is quick, since every public name is loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from saelab.version import __version__ as __version__

if TYPE_CHECKING:
    from saelab.analysis.attach import attach
    from saelab.analysis.frames import to_pandas
    from saelab.analysis.leave_one_out import LeaveOneOut
    from saelab.api import (
        compare,
        evaluate,
        fine_tune,
        from_pretrained,
        latent,
        load,
        saebench_result,
        save,
        settings,
        train,
    )
    from saelab.data.synthetic.chains import SyntheticConfig, generate, truth_of
    from saelab.launch.entry import main
    from saelab.launch.synthetic.matched import at_target
    from saelab.launch.synthetic.training import Conditions, train_on
    from saelab.parts import register
    from saelab.sae import SAE, SAEConfig
    from saelab.study.plan import Arm, Confirmation, FromArm, Run

#: Public name -> module that defines it.
_PLACES = {
    "attach": "saelab.analysis.attach",
    "compare": "saelab.api",
    "evaluate": "saelab.api",
    "fine_tune": "saelab.api",
    "from_pretrained": "saelab.api",
    "latent": "saelab.api",
    "load": "saelab.api",
    "saebench_result": "saelab.api",
    "save": "saelab.api",
    "settings": "saelab.api",
    "train": "saelab.api",
    "LeaveOneOut": "saelab.analysis.leave_one_out",
    "to_pandas": "saelab.analysis.frames",
    "register": "saelab.parts",
    "SAE": "saelab.sae",
    "SAEConfig": "saelab.sae",
    "main": "saelab.launch.entry",
    "Arm": "saelab.study.plan",
    "Confirmation": "saelab.study.plan",
    "FromArm": "saelab.study.plan",
    "Run": "saelab.study.plan",
    "SyntheticConfig": "saelab.data.synthetic.chains",
    "generate": "saelab.data.synthetic.chains",
    "truth_of": "saelab.data.synthetic.chains",
    "at_target": "saelab.launch.synthetic.matched",
    "Conditions": "saelab.launch.synthetic.training",
    "train_on": "saelab.launch.synthetic.training",
}

#: Names of an experiment.py: the entry loads torch for them, so that a signal that comes meanwhile
#: ends the process with one sentence.
_OF_EXPERIMENT = {"Arm", "Confirmation", "FromArm", "Run"}

__all__ = [
    "SAE",
    "Arm",
    "Conditions",
    "Confirmation",
    "FromArm",
    "LeaveOneOut",
    "Run",
    "SAEConfig",
    "SyntheticConfig",
    "at_target",
    "attach",
    "compare",
    "evaluate",
    "fine_tune",
    "from_pretrained",
    "generate",
    "latent",
    "load",
    "main",
    "register",
    "saebench_result",
    "save",
    "settings",
    "to_pandas",
    "train",
    "train_on",
    "truth_of",
]


def __dir__() -> list[str]:
    """Returns the public names, for `dir`, `help` and completion."""
    return sorted(
        [*__all__, "__all__", "__doc__", "__file__", "__name__", "__path__", "__version__"]
    )


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'saelab' has no attribute {name!r}")
    from importlib import import_module

    if name in _OF_EXPERIMENT:
        import_module("saelab.launch.entry")
    return getattr(import_module(_PLACES[name]), name)
