"""Hold a run to its plan, before a weight is read: what certainly cannot fit is refused, what is not free warned of."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import nn

from optimum_sab.calibration.joining import launched
from optimum_sab.calibration.options import RunOptions
from optimum_sab.calibration.plan.expectation import shortages
from optimum_sab.calibration.plan.fit import refuse_what_cannot_fit
from optimum_sab.calibration.plan.limits import Room
from optimum_sab.calibration.plan.memory import MACHINE
from optimum_sab.calibration.progress import OnStep
from optimum_sab.calibration.run import Run
from optimum_sab.calibration.stage import Stage
from optimum_sab.errors import warn
from optimum_sab.hf.config import SABConfig
from optimum_sab.hf.find_processor import ReadEvaluation, ReadSamplesEarly, ReadUnseen
from optimum_sab.hf.origin import Origin
from optimum_sab.hf.selection import select
from optimum_sab.hf.workload import disk_uses, rooms_of, workload


class HoldToPlan(Stage):
    """Refuses what `refuse_what_cannot_fit` does, and warns of `shortages`, of the samples that were read.

    Args:
        config: what is binarized.
        readers: the stages, before this one, that have samples by now, and what the finished model is compared with,
            of the package and of others.
        origin: of the model; None where it is not known.
        device_map: where the weights will be, as `from_pretrained` takes it.
    """

    name: ClassVar[str] = "plan"

    def __init__(
        self,
        config: SABConfig,
        readers: tuple[ReadSamplesEarly, ReadUnseen, ReadEvaluation],
        origin: Origin | None,
        device_map: Any,
    ) -> None:
        self._config = config
        self._samples, self._unseen, self._evaluation = readers
        self._place = None if origin is None else origin.files, device_map

    def check(self, model: nn.Module, options: RunOptions) -> None:
        selection = select(model, self._config, strict=True)
        samples = self._samples.early(model)
        unseen = [*self._unseen.early(model), *self._evaluation.early(model, options)]
        work = workload(model, selection, self._config, samples, self._place, unseen)
        size = launched()[1]
        least = most = work
        if size > 1:
            least = replace(work, samples=work.samples.share(size), ranks=size)
            most = replace(work, samples=work.samples.largest_share(size), ranks=size)
        rooms, refusing = rooms_of(work), not self._config.ignore_plan
        disks = disk_uses(least)
        if refusing:
            refuse_what_cannot_fit(least, rooms, disks)
        for message in shortages(most, _shared(rooms), disks if most is least else disk_uses(most), refusing):
            warn(message)

    def wanted(self, run: Run) -> bool:
        return False  # all is said before weights are read

    def apply(self, run: Run, on_step: OnStep) -> None:
        """Nothing is left to do."""


def _shared(rooms: Mapping[str, Room]) -> dict[str, Room]:
    """What is free of the machine's memory for each of the processes that torchrun has started on it."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if launched()[1] > 1 else 1
    machine = rooms[MACHINE]
    return {**rooms, MACHINE: replace(machine, free=None if machine.free is None else machine.free // max(1, local))}
