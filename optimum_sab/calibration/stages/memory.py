"""Say before the work whether the activations find room."""

from __future__ import annotations

from typing import ClassVar

from optimum_sab.calibration.progress import OnStep
from optimum_sab.calibration.run import Run
from optimum_sab.calibration.stage import Stage
from optimum_sab.calibration.streams.memory import warn_of_memory


class LookAtMemory(Stage):
    """Warns where calibration takes more than is free."""

    name: ClassVar[str] = "memory"

    def apply(self, run: Run, on_step: OnStep) -> None:
        options = run.options
        inputs = [run.samples.inputs[index] for index in run.samples.own]
        room = options.activation_memory
        warn_of_memory(run.model, run.selection, inputs, options.device, run.two_streams, room=room)
