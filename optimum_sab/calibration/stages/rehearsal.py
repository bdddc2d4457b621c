"""Try one forward with packed layers before the work."""

from __future__ import annotations

from contextlib import ExitStack
from typing import ClassVar

from optimum_sab.calibration.progress import OnStep
from optimum_sab.calibration.rehearsal import (
    one_of_each_kind,
    packed_in_place,
    random_state_kept,
    refusal,
    refusal_up_to,
)
from optimum_sab.calibration.run import Run
from optimum_sab.calibration.samples.calibration_samples import CalibrationSamples
from optimum_sab.calibration.stage import Stage
from optimum_sab.calibration.streams.targets import decoder_targets
from optimum_sab.nn.streamed import streamed_blocks, weights_here


class RehearseForward(Stage):
    """One sample goes through the model where it is, with packed layers of random content in a block of every kind.

    What is packed has been seen not to be offloaded; other modules that are come by their own hooks.
    """

    name: ClassVar[str] = "rehearsal"

    def wanted(self, run: Run) -> bool:
        return run.kept(CalibrationSamples) is not None

    def apply(self, run: Run, on_step: OnStep) -> None:
        sample, model = run.samples.inputs[telling_sample(run.samples)], run.model
        blocks = one_of_each_kind(decoder_targets(model, run.selection))
        with random_state_kept(), ExitStack() as there:
            for each in blocks:
                there.enter_context(weights_here(each.block))
            with packed_in_place(model, blocks, run.selection.settings, run.options.backend) as packed:
                if streamed_blocks(model):  # the others are dense and have computed; each would be read for it
                    refused = refusal_up_to(model, blocks, sample, packed)
                else:
                    refused = refusal(model, sample, packed)
            if refused is not None:
                raise refusal(model, sample, ()) or refused  # the sample may be what is wrong


def telling_sample(samples: CalibrationSamples) -> int:
    """Index of the shortest of those with the most modalities."""

    def rank(index: int) -> tuple[int, int]:
        modalities = samples.modalities[index]
        present = sum(modalities.count(name) > 0 for name in modalities.names)
        return -present, modalities.labels.numel()

    return min(range(len(samples)), key=rank)
