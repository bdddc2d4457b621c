"""A run is a list of stages: what a stage is, and how a list is gone through."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import Any, ClassVar

from torch import nn

from optimum_sab.calibration.options import RunOptions
from optimum_sab.calibration.progress import OnStep
from optimum_sab.calibration.report import BinarizationReport, StageReport
from optimum_sab.calibration.run import Run
from optimum_sab.calibration.streams.memory import give_back_freed
from optimum_sab.calibration.streams.modes import reading
from optimum_sab.core.parts import part
from optimum_sab.errors import warn, warnings_heard


class Stage(ABC):
    """One thing done to a run.

    What can be refused is refused as early as it shows: by `check` before a weight is read, by `prepare` with the dense
    model there and nothing done yet.

    Attributes:
        name: of its section of the report.
        title: of its progress; empty for one that takes no time.
        unit: of its progress.
        by: the one rank of several that does it, counted around where there are fewer; the others learn its section,
            and what it leaves for later stages is there alone. Such stages that follow each other are done at the same
            time by different ranks, so none may need what another rank's leaves. None: all ranks do it together.
    """

    name: ClassVar[str]
    title: ClassVar[str] = ""
    unit: ClassVar[str] = "step"
    by: ClassVar[int | None] = None

    def check(self, model: nn.Module, options: RunOptions) -> None:  # noqa: B027  # most have nothing to refuse
        """Refuse what cannot work, before a weight is read: the model's may be on meta."""

    def prepare(self, run: Run) -> None:  # noqa: B027
        """Refuse what cannot work, before any stage has begun: the model is loaded."""

    def wanted(self, run: Run) -> bool:
        """Whether there is anything to do: the options ask for it, and no interrupted run has done it all."""
        return True

    @abstractmethod
    def apply(self, run: Run, on_step: OnStep) -> Any:
        """Do it.

        Args:
            run: what earlier stages have kept is there.
            on_step: told how far the stage is.

        Returns:
            The stage's section of the report; None where it has nothing to say.
        """


def check_stages(stages: Sequence[Stage], model: nn.Module, options: RunOptions) -> None:
    """Let every stage refuse what cannot work, before a weight is read."""
    for stage in stages:
        stage.check(model, options)


def run_stages(run: Run, stages: Sequence[Stage]) -> BinarizationReport:
    """Go through the list. After an error the model may be half binarized: discard it.

    The model is in eval mode meanwhile, and in the mode it was in afterwards.
    """
    with reading(run.model), warnings_heard() as heard:
        for stage in stages:
            stage.prepare(run)
        done: list[StageReport | None] = []
        for alone, following in groupby(stages, lambda stage: stage.by is not None):
            some = list(following)
            done += _by_one_each(run, some) if alone else [_timed(run, stage) for stage in some]
    told = run.ranks.exchange("the end", heard)
    warnings = tuple(dict.fromkeys(message for each in told for message in each))
    if run.ranks.first:
        for message in warnings[len(heard) :]:  # what only others were warned of
            warn(message)
    return BinarizationReport(tuple(each for each in done if each is not None), warnings)


def _by_one_each(run: Run, stages: Sequence[Stage]) -> list[StageReport | None]:
    """What stages report that one rank does: every rank does its own, then all learn of all."""
    owners = {stage.name: (stage.by or 0) % run.ranks.size for stage in stages}
    own = {stage.name: _timed(run, stage) for stage in stages if owners[stage.name] == run.ranks.rank}
    return [run.ranks.give(f"stage {name!r}", owner, partial(own.get, name)) for name, owner in owners.items()]


def _timed(run: Run, stage: Stage) -> StageReport | None:
    """What a stage reports; None where it was not wanted."""
    if not stage.wanted(run):
        return None
    started = time.perf_counter()
    with part(stage.name):
        section = stage.apply(run, run.progress.steps(stage.title, stage.unit))
    give_back_freed()
    return StageReport(stage.name, time.perf_counter() - started, section)
