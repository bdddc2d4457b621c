"""Try one forward with packed layers before a weight is read."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from optimum_sab.calibration.early_rehearsal import rehearse_unloaded
from optimum_sab.calibration.options import RunOptions
from optimum_sab.calibration.progress import OnStep
from optimum_sab.calibration.run import Run
from optimum_sab.calibration.samples.calibration_samples import CalibrationSamples
from optimum_sab.calibration.stage import Stage
from optimum_sab.calibration.stages.rehearsal import telling_sample
from optimum_sab.hf.config import SABConfig
from optimum_sab.hf.find_processor import ReadSamplesEarly, ReadUnseen
from optimum_sab.hf.selection import select


class RehearseUnloaded(Stage):
    """One sample goes through the model's forward with stand-ins for its weights; see `rehearse_unloaded`.

    Args:
        config: what is binarized.
        reader: the stage, before this one, that has samples by now.
        elsewhere: whether the model is to compute on another device than the CPU.
    """

    name: ClassVar[str] = "early rehearsal"

    def __init__(self, config: SABConfig, reader: ReadSamplesEarly | ReadUnseen, elsewhere: bool) -> None:
        self._config = config
        self._reader = reader
        self._elsewhere = elsewhere

    def check(self, model: nn.Module, options: RunOptions) -> None:
        inputs = self._reader.early(model)
        if inputs:
            samples = CalibrationSamples.of(inputs, getattr(model, "config", None))
            sample = inputs[telling_sample(samples)]
            rehearse_unloaded(model, select(model, self._config, strict=True), sample, self._elsewhere)

    def wanted(self, run: Run) -> bool:
        return False  # by then the weights are there, and the rehearsal proper sees more

    def apply(self, run: Run, on_step: OnStep) -> None:
        """Nothing is left to do."""
