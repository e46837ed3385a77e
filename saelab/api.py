"""saelab from Python: train one SAE, evaluate it, compare arms. Re-exported by `saelab`.

base = saelab.settings("configs/embedded.toml")
sae = saelab.train(base, seed=0)
print(saelab.evaluate(sae, base)["explained_variance"])
for c in saelab.compare(base, {"A1": {"sae.scaling": {"kind": "variance"}}}, seeds=3):
    print(c.arm, c.word, c.mean_diff, c.low, c.high)
"""

from __future__ import annotations

import inspect
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from saelab import formats
from saelab.analysis import one_latent
from saelab.analysis.evaluate import Bench, place_of
from saelab.analysis.saebench import result_of
from saelab.config import read_toml
from saelab.data.probing.saebench import Definition
from saelab.distributed.ranks import Ranks
from saelab.errors import SettingError
from saelab.evals import check_names, of_subject
from saelab.evals.base import Row, Subject
from saelab.formats.hub import reference
from saelab.launch.over_settings import launch_over_settings
from saelab.launch.prepare import prepare, spliced_model
from saelab.origin import Origin, origin_of
from saelab.runtime.counting import count
from saelab.runtime.safe_text import visible
from saelab.runtime.torch_defaults import standard_torch
from saelab.sae import SAE
from saelab.storage.cache import cache_folder
from saelab.study.experiment_file import load_experiment
from saelab.study.plan import (
    BASELINE,
    Arm,
    BaseConfig,
    PlanConfig,
    Run,
    arm_settings,
    has_levels,
)
from saelab.study.task import Launch
from saelab.training.train import Surroundings, train_one
from saelab.verdict.judge import Comparison

#: Evaluations that read texts of their own.
PROBES = frozenset({"probing", "model_channels", "sae_probes", "sae_probes_channels"})
#: Metrics that `repr` of scores shows. Our choice: they fit a screen.
MOST_SHOWN = 24


class Scores(dict[str, float]):
    """Metric -> value over all data; `rows` holds every row, slices and missing values included,
    `mismatch` the differences between the data and those that the SAE was trained on."""

    rows: list[Row]
    mismatch: str = ""

    def __repr__(self) -> str:
        """Returns a line for each metric, the first ones where there are many."""
        width = max(map(len, self), default=0)
        lines = [f"  {name:{width}}  {value:.5g}" for name, value in self.items()]
        more = f"  and {count(len(lines) - MOST_SHOWN, 'more value')}: saelab.to_pandas(scores)"
        shown = lines if len(lines) <= MOST_SHOWN + 1 else [*lines[:MOST_SHOWN], more]
        odd = [f"  the SAE {self.mismatch}"] if self.mismatch else []
        return "\n".join([f"Scores: {count(len(self), 'value')}", *odd, *shown])


class Comparisons(list[Comparison]):
    """The verdict on each arm; `repr` has a line for each."""

    def __repr__(self) -> str:
        return "\n".join(map(repr, self)) or "no comparisons"


#: What the functions take as settings: `BaseConfig`, the same as plain data, or a TOML file.
Base = BaseConfig | Mapping[str, Any] | str | Path


def _settings(base: Base) -> BaseConfig:
    """Returns the settings that a caller gave in any of their forms.

    Raises: SettingError for anything else; SourceError, SettingError as `settings`.
    """
    if isinstance(base, BaseConfig):
        return base
    if isinstance(base, (str, Path)):
        return settings(base)
    if isinstance(base, Mapping):
        return BaseConfig.parse(dict(base))
    remedy = "give settings: saelab.settings(...), the path of a TOML file, or a dict of them"
    raise SettingError("base", type(base).__name__, remedy)


def settings(base: Base, changes: Mapping[str, Any] | None = None) -> BaseConfig:
    """Reads base settings and changes dotted ones.

    Args:
        base: a TOML file, or settings as a dict or as this function returns them.
        changes: dotted name -> value, as in {"sae.d_sae": 512}.

    Raises: SourceError for a missing file; SettingError for an unknown or impossible setting.
    """
    if isinstance(base, (str, Path)):
        path = Path(base)
        return BaseConfig.parse(read_toml(path), where=path.name).patched(dict(changes or {}))
    return _settings(base).patched(dict(changes or {}))


@standard_torch()
def train(base: Base, seed: int = 0, cache: str | Path = ".") -> SAE:
    """Trains one SAE on the activations that `base` describes.

    Args:
        base: model, texts, hook, SAE and training, as settings, a dict, or the path of a TOML file.
        seed: of initialisation, data order and resampling.
        cache: harvested activations are stored in `<cache>/.saelab`.

    Returns: the SAE in evaluation mode.
    Raises: CellFailure when the loss is not finite; UsageError for bad input.
    """
    return _train(_settings(base), seed, cache)


@standard_torch()
def fine_tune(
    sae: SAE | str | Path, base: Base, seed: int = 0, cache: str | Path = ".", format: str = ""
) -> SAE:
    """Trains an SAE further, for example a published one on other text or with another loss.

    Size, activation and scaling stay those of the SAE; losses, controllers, constraints, observers
    and the optimiser are those of `base.sae` and `base.train`, and start anew.

    Args:
        sae: in evaluation mode, or the folder of one in any format that `load` reads; not changed.
        base, seed, cache: as for `train`.
        format: of the folder, as for `load`.

    Returns: another SAE, in evaluation mode.
    Raises: CellFailure when the loss is not finite; UsageError for bad input, such as activations
        of another width.
    """
    start = sae if isinstance(sae, SAE) else load(sae, format)
    return _train(_settings(base), seed, cache, start)


def _unprobed(base: BaseConfig) -> BaseConfig:
    """Returns settings with which no texts are read for probes."""
    nothing = {"probing.entries": "none", "probing.tables": [], "extra": []}
    return base.patched({f"evaluation.{name}": value for name, value in nothing.items()})


def _train(base: BaseConfig, seed: int, cache: str | Path, start: SAE | None = None) -> SAE:
    place, device = cache_folder(Path(cache)), base.model.device
    prepared = prepare(_unprobed(base), place, device, keep_model=True)
    if prepared.warning:
        print(visible(prepared.warning), file=sys.stderr)
    around = Surroundings(
        layout=base.layout,
        ranks=Ranks(device=torch.device(base.model.device)),
        calibration=prepared.calibration,
        start=start,
        spliced=spliced_model(base, base.model.device, prepared.model),
    )
    sae = train_one(prepared.train, base.sae, base.train, seed, around).sae
    sae.origin = Origin(*place_of(base, prepared.provenance))
    return sae


@standard_torch()
def load(path: str | Path, format: str = "", experiment: str | Path | None = None) -> SAE:
    """Loads the SAE in a directory of ours, of another tool, or of a published layout
    (docs/formats.md), in evaluation mode; `sae.complete(sae.decode(sae.encode(x)), x)` is its
    reconstruction.

    Args:
        path: a folder, or the name of an SAE on the hub, `hub:owner/name[@revision][:path]`.
        format: '' recognises the format by its files; one that holds a pickle must be named
            ('dictionary_learning', 'goodfire', 'openai', ...).
        experiment: the experiment.py that registers parts which this SAE has; its code is run.

    Raises: SourceError, SettingError when the directory holds no SAE that can be read.
    """
    if experiment is not None:
        load_experiment(Path(experiment).resolve())
    return formats.load(path, format).sae


@standard_torch()
def from_pretrained(
    release: str,
    sae_id: str = "",
    *,
    revision: str = "",
    format: str = "",
    base: Base | None = None,
) -> SAE:
    """Loads a published SAE by name from the Hugging Face hub, through its cache (docs/sharing.md).

    saelab.from_pretrained("gemma-scope-2b-pt-res", "layer_12/width_16k/average_l0_82")

    Args:
        release: a name in saelab/assets/releases.toml, or 'owner/name' of a repository.
        sae_id: the SAE in it; of a repository the path of its folder or file.
        revision: branch, tag or commit; '' for the main branch.
        format: as for `load`; a pickle must be named.
        base: if given, settings of the model and hook point that it must have been trained on.

    Returns: the SAE, in evaluation mode.
    Raises: SettingError for an unknown name; SourceError where the hub does not have it, refuses it
        or is not reached; MismatchError for an SAE of another model or hook than `base` names.
    """
    if "/" in release:
        where = reference.reference(release, sae_id, revision)
    else:
        where = reference.in_release(release, sae_id, revision)
    loaded = formats.load(where, format)
    if base is not None:
        loaded.origin.check(*place_of(_settings(base)), "leave base out")
    return loaded.sae


@standard_torch()
def save(
    sae: SAE, folder: str | Path, format: str = "saelens", about: Mapping[str, Any] | None = None
) -> None:
    """Writes an SAE in the format of another tool ('saelens'), or in our own ('saelab'), as
    `sae.save(folder)` does.

    Args:
        about: metadata to store: model, hook_name, context, dataset and anything else.

    Raises: SettingError when a part of the SAE can't be folded into that format.
    """
    formats.saver(format)(sae, Path(folder), about or {})


@standard_torch()
def evaluate(
    subject: Subject,
    base: Base,
    evals: Sequence[str] = ("core",),
    seed: int = 0,
    cache: str | Path = ".",
    definition: Definition | None = None,
    allow_mismatch: bool = False,
) -> Scores:
    """Evaluates any object with encode and decode on the held-out text of `base`.

    Args:
        subject: an SAE, or any object with d_in, d_sae, encode and decode in raw activation space.
        evals: names of evaluations, from this table:
            {evals}
        seed: of the probing examples.
        definition: of sparse probing, 2 or 1 (SAEBench's); None takes that of `base`.
        allow_mismatch: evaluates an SAE that was trained on another model or hook point too;
            `mismatch` of the scores then says so.

    Raises: SettingError for an evaluation that is unknown or needs more than the subject;
        MismatchError for an SAE of another width, model or hook point.
    """
    check_names(evals)
    base = _settings(base)
    if definition is not None:
        base = base.patched({"evaluation.probing.definition": definition})
    if not PROBES.intersection(evals):
        base = _unprobed(base)
    origin, folder = origin_of(subject), cache_folder(Path(cache))
    bench = Bench(base, folder, seed) if base.activations is not None else None
    place = place_of(base, bench and bench.provenance)
    if not allow_mismatch:
        origin.check(*place, "set allow_mismatch=True")
    bench = bench or Bench(base, folder, seed)  # after the check: a harvest takes long
    rows = bench.rows(subject, evals)
    scores = Scores({r.metric: r.value for r in rows if not r.slice and r.value is not None})
    scores.rows, scores.mismatch = rows, "; ".join(origin.differences(*place))
    return scores


_TABLE = "\n        ".join(f"'{one.name}': {one.description}" for one in of_subject())
evaluate.__doc__ = inspect.cleandoc(evaluate.__doc__ or "").replace("{evals}", _TABLE)


@standard_torch()
def latent(
    sae: SAE | str | Path,
    index: int,
    base: Base | None = None,
    examples: int = 8,
    cache: str | Path = ".",
    format: str = "",
    allow_mismatch: bool = False,
) -> one_latent.LatentView:
    """Describes one latent on held-out text: contexts, density, logit lens, nearest latents.

    Args:
        sae: in evaluation mode, or the folder of one: a cell of a run, or any that `load` reads.
        index: of the latent, from 0.
        base: model, hook and text; None takes those of the cell's run.
        examples: number of contexts.
        cache: harvested activations are stored in `<cache>/.saelab`.
        format: of the folder, as for `load`.
        allow_mismatch: takes an SAE of another model or hook point.

    Returns: a view that prints itself; `.as_dict()` is plain data, `.latent` the numbers.
    Raises: SettingError for a latent that does not exist; MismatchError for an SAE of another
        width, model or hook point.
    """
    if not isinstance(sae, SAE) and base is None:
        sae, base = one_latent.saved_sae(Path(sae), None, format)
    if base is None:
        raise SettingError("base", None, "name model, hook and text: saelab.settings(...)")
    subject = sae if isinstance(sae, SAE) else load(sae, format)
    base, place = _settings(base), cache_folder(Path(cache))
    if base.activations is None and not allow_mismatch:
        subject.origin.check(*place_of(base), "set allow_mismatch=True")
    return one_latent.view_latents(subject, [index], base, place, examples)[0]


@standard_torch()
def saebench_result(
    scores: Scores, subject: Subject, base: Base, name: str = "custom_sae", seed: int = 0
) -> dict[str, Any]:
    """Builds SAEBench's result file of an evaluation, as plain data.

    Args:
        scores: from `evaluate` with 'probing' and 'model_channels'.
        subject, base: as given to `evaluate`.
        name: of the SAE.
        seed: of the probing examples; definition 1 has SAEBench's own.

    Raises: SourceError when the scores lack what the schema asks for.
    """
    return result_of(scores.rows, subject, _settings(base), name, seed)


@standard_torch()
def compare(
    base: Base,
    arms: Mapping[str, Mapping[str, Any]],
    seeds: int = 8,
    out_dir: str | Path | None = None,
    study: str = "compare",
    workers: int = 0,
    **plan: Any,
) -> Comparisons:
    """Trains arms and the baseline, paired by seed, and returns the verdict on each arm.

    Args:
        base: settings of the baseline.
        arms: name -> dotted settings that the arm changes.
        seeds: per arm at the target L0.
        out_dir: folder for the run's files; None stores none of them.
        study: name of the study, from which the seeds are derived.
        workers: number of processes; 0 trains in this one.
        plan: further settings of the plan, such as primary, sesoi or target_l0. Unless it says
            otherwise, every arm also has two seeds at half and at twice the target, between which
            its cells are moved to the target (`saelab.verdict.l0_adjustment`); seeds_levels=0
            leaves them out, and the interval is wider instead.

    Returns: one `Comparison` per arm, made at the declared L0 as the verdict of a run is.
    """
    resolved = _settings(base)
    options = {"base": "settings given in Python", "seeds": seeds, "seeds_other": seeds} | plan
    rules = PlanConfig.parse({"study": study, **options})
    if "levels" not in plan:
        rules = rules.patched({"levels": _levels_around(rules.target_l0, resolved)})
    table = [Arm(BASELINE), *(Arm(name, changes, primary=True) for name, changes in arms.items())]
    run = Run(f"Compare {', '.join(arms)}", table)
    run = replace(run, arms=[_with_levels(arm, run, rules, resolved) for arm in table])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(out_dir) if out_dir else Path(temporary) / "compare"
        task = Launch(
            name=folder.name,
            run=run,
            plan=rules,
            base=resolved,
            out_dir=folder,
            root=Path(),
            workers=workers,
            quiet=True,
        )
        return Comparisons(launch_over_settings(task))


def _levels_around(target: float | None, base: BaseConfig) -> tuple[float, ...]:
    """Half and twice the target, at most the number of latents; none without a target."""
    return () if target is None else (target / 2, min(2 * target, float(base.sae.d_sae)))


def _with_levels(arm: Arm, run: Run, plan: PlanConfig, base: BaseConfig) -> Arm:
    """The arm, without further levels where its L0 does not follow a level."""
    if plan.target_l0 is None:
        return arm
    follows = has_levels(arm, arm_settings(base, run, arm).sae, plan.target_l0)
    return replace(arm, levels=follows)
