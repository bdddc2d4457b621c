"""Fit the temperature of the binarized model's predictions."""

from __future__ import annotations

from typing import ClassVar

from optimum_sab.calibration.predictions.at_head import AtHead
from optimum_sab.calibration.predictions.temperature import Temperature, set_temperature
from optimum_sab.calibration.progress import OnStep
from optimum_sab.calibration.run import Run
from optimum_sab.calibration.stage import Stage
from optimum_sab.calibration.stages.head import Head


class ScaleTemperature(Stage):
    """Scales the norm before the output embedding."""

    name: ClassVar[str] = "temperature"

    def wanted(self, run: Run) -> bool:
        head = run.kept(Head)
        return head is not None and head.last_norm is not None

    def apply(self, run: Run, on_step: OnStep) -> Temperature | None:
        head, at_head = run.kept(Head), run.kept(AtHead)
        assert head is not None and head.last_norm is not None and at_head is not None
        pairs = at_head.pairs(run.samples.modalities)
        return set_temperature(run.model, head.last_norm, pairs, run.options.device)
