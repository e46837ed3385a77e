"""One launch as data: what is to be trained, where, and with which seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from saelab.runs.schema import QUICK, SETTINGS
from saelab.study.plan import BaseConfig, CellSpec, PlanConfig, Run, cells

#: A launch that is expected to take longer is refused: a driver would kill it at 7200 s.
LONGEST = 7000.0


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Settings of a launch: the work to do and the place for it.

    Args:
        name: of the run, 'run_3'; of its quick form 'run_3 (quick)'.
        run: its arms.
        out_dir: the run folder to make.
        root: folder of plan.toml; the cache lies there.
        experiment: the file with the run table, for workers that need its parts.
        purpose: 'explore', 'confirm', 'tune' or 'quick': which seeds.
        force: replace a complete run.
        limit: seconds that the launch may be expected to take.
        workers: processes; 0 works in this one, None takes one per core.
        executor: where the cells are trained, see `executors`; '' for what SAELAB_EXECUTOR names.
        seeds: of the baseline and the primary arms where they have more than the plan says, since
            a decision asked for more; None for the plan's number.
        seed_set: name of a further set of seeds of the study, '' for its first.
        fixed_seeds: in place of those of the study; () for these.
        planned_as, based_on: plan and base settings as their files say, where options of the
            command line changed them; None where they did not.
        quiet: whether only warnings and progress are printed.
        planned: comparisons of the study where neither the plan nor the run table says how many.
        table: all runs of the study, this one among them.
        setting: name of the one of the plan's further settings that `base` is of; '' for its own.
    """

    name: str
    run: Run
    plan: PlanConfig
    base: BaseConfig
    out_dir: Path
    root: Path
    experiment: Path | None = None
    purpose: str = "explore"
    force: bool = False
    limit: float = LONGEST
    workers: int | None = None
    executor: str = ""
    table: Mapping[str, Run] = field(default_factory=dict)
    setting: str = ""
    seeds: int | None = None
    seed_set: str = ""
    planned: int | None = None
    fixed_seeds: tuple[int, ...] = ()
    planned_as: PlanConfig | None = None
    based_on: BaseConfig | None = None
    quiet: bool = False

    @property
    def label(self) -> str:
        """Name of the run and, below it, of the setting: 'run_3/settings/wide'."""
        return f"{self.name}/{SETTINGS}/{self.setting}" if self.setting else self.name

    @property
    def further_settings(self) -> tuple[str, ...]:
        """Names of the plan's further settings; () for the launch of one of them."""
        return () if self.setting else tuple(each.name for each in self.plan.settings)

    @property
    def seed_stream(self) -> str:
        """Name of the stream of seeds: every setting has seeds of its own, so that the errors of
        its effects are independent of those of the others, as has every further set of seeds."""
        return "/".join(part for part in (self.purpose, self.setting, self.seed_set) if part)

    def cells(self, run: Run | None = None) -> list[CellSpec]:
        """All cells of the launch, see `plan.cells`.

        Args:
            run: in place of the launch's.
        """
        seeds = {} if self.seeds is None else {"seeds": self.seeds}
        plan = self.plan.model_copy(update=seeds)
        return cells(plan, self.base, run or self.run, self.seed_stream, self.fixed_seeds)

    @property
    def judged(self) -> bool:
        """Returns True for a run of a study; a single comparison, a tuning and a quick form
        register nothing."""
        return self.experiment is not None and self.purpose not in ("tune", QUICK)

    @property
    def entry(self) -> str:
        """Name of the run in the run table."""
        return self.out_dir.name if self.purpose == QUICK else self.name


#: Cells of one seed that share a pass over the stream in one job.
GROUP = 3
