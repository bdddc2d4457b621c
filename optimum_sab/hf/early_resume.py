"""Compare a run with the one that its resume folder belongs to, before a weight is read."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from optimum_sab.calibration.joining import launched
from optimum_sab.calibration.options import RunOptions
from optimum_sab.calibration.progress import OnStep
from optimum_sab.calibration.resume.fingerprint import fingerprint
from optimum_sab.calibration.resume.folder import ResumeFolder
from optimum_sab.calibration.run import Run
from optimum_sab.calibration.stage import Stage
from optimum_sab.hf.config import SABConfig
from optimum_sab.hf.find_processor import ReadSamplesEarly
from optimum_sab.hf.selection import select


class LookIntoResumeFolder(Stage):
    """Refuses a folder of another run, as far as settings and samples tell: only its model is compared later.

    Args:
        config: what is binarized.
        reader: the stage, before this one, that has samples by now.
    """

    name: ClassVar[str] = "early resume"

    def __init__(self, config: SABConfig, reader: ReadSamplesEarly) -> None:
        self._config = config
        self._reader = reader

    def check(self, model: nn.Module, options: RunOptions) -> None:
        if options.resume_folder is None or launched()[0] != 0:
            return
        samples = None if options.source.written else self._reader.early(model)
        selection = select(model, self._config, strict=True)
        ResumeFolder(options.resume_folder, fingerprint(None, selection, samples, options), begin=False)

    def wanted(self, run: Run) -> bool:
        return False  # with the weights there, all is compared

    def apply(self, run: Run, on_step: OnStep) -> None:
        """Nothing is left to do."""
