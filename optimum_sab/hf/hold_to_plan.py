"""Hold a run to its plan: what certainly cannot fit is refused before a weight is read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from torch import nn

from optimum_sab.calibration.joining import launched
from optimum_sab.calibration.options import RunOptions
from optimum_sab.calibration.plan.fit import refuse_what_cannot_fit
from optimum_sab.calibration.progress import OnStep
from optimum_sab.calibration.run import Run
from optimum_sab.calibration.stage import Stage
from optimum_sab.hf.config import SABConfig
from optimum_sab.hf.find_processor import ReadSamplesEarly
from optimum_sab.hf.origin import Origin
from optimum_sab.hf.selection import select
from optimum_sab.hf.workload import disk_uses, rooms_of, workload


class HoldToPlan(Stage):
    """Refuses what `refuse_what_cannot_fit` does, of the samples that were read and the devices that are there.

    Args:
        config: what is binarized.
        reader: the stage, before this one, that has samples by now.
        origin: of the model; None where it is not known.
        device_map: where the weights will be, as `from_pretrained` takes it.
    """

    name: ClassVar[str] = "plan"

    def __init__(self, config: SABConfig, reader: ReadSamplesEarly, origin: Origin | None, device_map: Any) -> None:
        self._config = config
        self._reader = reader
        self._place = None if origin is None else origin.files, device_map

    def check(self, model: nn.Module, options: RunOptions) -> None:
        if self._config.ignore_plan:
            return
        selection = select(model, self._config, strict=True)
        work = workload(model, selection, self._config, self._reader.early(model), self._place)
        size = launched()[1]
        if size > 1:
            work = replace(work, samples=work.samples.share(size))
        refuse_what_cannot_fit(work, rooms_of(work), disk_uses(work))

    def wanted(self, run: Run) -> bool:
        return False  # with the weights there, a warning says what is left to say

    def apply(self, run: Run, on_step: OnStep) -> None:
        """Nothing is left to do."""
