"""Hold a run to its plan, before a weight is read: what certainly cannot fit is refused, what is not free warned of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from torch import nn

from optimum_sab.calibration.joining import launched
from optimum_sab.calibration.options import RunOptions
from optimum_sab.calibration.plan.expectation import shortages
from optimum_sab.calibration.plan.fit import refuse_what_cannot_fit
from optimum_sab.calibration.progress import OnStep
from optimum_sab.calibration.run import Run
from optimum_sab.calibration.stage import Stage
from optimum_sab.errors import warn
from optimum_sab.hf.config import SABConfig
from optimum_sab.hf.find_processor import ReadSamplesEarly, ReadUnseen
from optimum_sab.hf.origin import Origin
from optimum_sab.hf.selection import select
from optimum_sab.hf.workload import disk_uses, rooms_of, workload


class HoldToPlan(Stage):
    """Refuses what `refuse_what_cannot_fit` does, and warns of `shortages`, of the samples that were read.

    Args:
        config: what is binarized.
        readers: the stages, before this one, that have samples by now, and what the finished model is compared with.
        origin: of the model; None where it is not known.
        device_map: where the weights will be, as `from_pretrained` takes it.
    """

    name: ClassVar[str] = "plan"

    def __init__(
        self, config: SABConfig, readers: tuple[ReadSamplesEarly, ReadUnseen], origin: Origin | None, device_map: Any
    ) -> None:
        self._config = config
        self._samples, self._unseen = readers
        self._place = None if origin is None else origin.files, device_map

    def check(self, model: nn.Module, options: RunOptions) -> None:
        selection = select(model, self._config, strict=True)
        samples, unseen = self._samples.early(model), self._unseen.early(model)
        work = workload(model, selection, self._config, samples, self._place, unseen)
        size = launched()[1]
        if size > 1:
            work = replace(work, samples=work.samples.share(size))
        rooms, disks = rooms_of(work), disk_uses(work)
        if not self._config.ignore_plan:
            refuse_what_cannot_fit(work, rooms, disks)
        for message in shortages(work, rooms, disks):
            warn(message)

    def wanted(self, run: Run) -> bool:
        return False  # all is said before weights are read

    def apply(self, run: Run, on_step: OnStep) -> None:
        """Nothing is left to do."""
