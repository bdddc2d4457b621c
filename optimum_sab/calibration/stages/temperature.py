"""Fit the temperature of the binarized model's predictions."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from optimum_sab.calibration.predictions.at_head import AtHead
from optimum_sab.calibration.predictions.temperature import Temperature, set_temperature
from optimum_sab.calibration.progress import OnStep
from optimum_sab.calibration.run import Run
from optimum_sab.calibration.stage import Stage
from optimum_sab.calibration.stages.head import Head
from optimum_sab.calibration.streams.arrival import QUANTIZED


class ScaleTemperature(Stage):
    """Scales the norm before the output embedding."""

    name: ClassVar[str] = "temperature"

    def wanted(self, run: Run) -> bool:
        head = run.kept(Head)
        return head is not None and head.last_norm is not None

    def apply(self, run: Run, on_step: OnStep) -> Temperature | None:
        """Fitted by all ranks, to what all ranks' samples came to."""
        head, at_head = run.kept(Head), run.kept(AtHead)
        assert head is not None and head.last_norm is not None and at_head is not None
        last = head.last_norm
        wanted = {sample for sample, stream in head.awaited if stream == QUANTIZED}
        own = AtHead({worker: tensor for worker, tensor in at_head.given.items() if worker[0] in wanted})
        pairs = own.pairs(run.samples.modalities)
        fitted = set_temperature(run.model, last, pairs, run.options.device, run.ranks)

        def stored() -> tuple[Temperature | None, list[Tensor]]:
            return fitted, [each.detach() for each in last.module.parameters(recurse=False)]

        found, vectors = run.ranks.give("the temperature", 0, stored)
        for mine, each in zip(last.module.parameters(recurse=False), vectors, strict=True):
            mine.data.copy_(each)
        return found
