"""The stage that finds the model's processor."""

from __future__ import annotations

from typing import Any, ClassVar

from optimum_sab.calibration.progress import OnStep
from optimum_sab.calibration.run import Run
from optimum_sab.calibration.samples.modality import VISUAL, model_modalities
from optimum_sab.calibration.stage import Stage
from optimum_sab.hf.processor import find_processor
from optimum_sab.hf.selection import source_of


class FindProcessor(Stage):
    """From here on `Run.processor` is there.

    Args:
        given: `SABConfig.processor`.
    """

    name: ClassVar[str] = "processor"

    def __init__(self, given: Any) -> None:
        self._given = given

    def apply(self, run: Run, on_step: OnStep) -> None:
        visual = VISUAL in model_modalities(run.model.config)
        run.processor = find_processor(self._given, source_of(run.model), visual)
