"""Imports the file that defines arms: experiment.py (a run table) or candidate.py (one arm)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from saelab.errors import SourceError
from saelab.runtime.torch_defaults import standard_torch
from saelab.study.plan import Arm


def load_experiment(path: Path) -> ModuleType:
    """Imports experiment.py or candidate.py from its file (which registers its own parts).

    The run table of a file that has an arm alone, `ARM`, is empty.

    Files next to it can be imported from then on, as when Python is started with the file.

    Raises: SourceError when the file is missing, is not Python or defines neither.
    """
    name = "saelab_experiment"
    if name in sys.modules and getattr(sys.modules[name], "__file__", None) == str(path):
        return sys.modules[name]
    if not path.is_file():
        raise SourceError(f"{path} does not exist: run in the folder that holds experiment.py")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise SourceError(f"{path} is not a Python file: name one that ends in .py")
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with standard_torch():  # whatever the file sets is set back, as its cells share no process
        spec.loader.exec_module(module)
    if not hasattr(module, "RUNS"):
        if not hasattr(module, "ARM"):
            raise SourceError(f"{path} defines no RUNS: keep the run table under that name")
        module.RUNS = {}  # type: ignore[attr-defined]
    return module


def arm_of(path: Path, run: str, name: str) -> Arm:
    """Returns an arm as its file defines it: of a run of the table, or the file's only one."""
    module = load_experiment(path)
    arms = module.RUNS[run].arms if run in module.RUNS else [module.ARM]
    return next(arm for arm in arms if arm.name == name)
