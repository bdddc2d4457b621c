"""Remember what the dense model answers to samples that calibrate nothing."""

from __future__ import annotations

from typing import ClassVar

from optimum_sab.calibration.predictions.agreement import AgreementCheck
from optimum_sab.calibration.progress import OnStep
from optimum_sab.calibration.run import Run
from optimum_sab.calibration.samples.inputs import unseen_inputs
from optimum_sab.calibration.stage import Stage
from optimum_sab.errors import StreamError, warn


class RememberAnswers(Stage):
    """Leaves an `AgreementCheck` for `CompareAnswers`, where the model reads the samples for it."""

    name: ClassVar[str] = "answers"
    on_first: ClassVar[bool] = True

    def apply(self, run: Run, on_step: OnStep) -> None:
        try:
            blocks = [run.model.get_submodule(name) for name in run.selection.blocks]
            samples = unseen_inputs(run.model, run.processor)
            run.keep(AgreementCheck(run.model, samples, blocks, run.options.device))
        except StreamError:
            raise
        except Exception as error:  # a model may take only samples of its own kind, and can be binarized all the same
            warn(
                "the finished model will not be compared with the dense one, which does not read the samples for that: "
                f"{error}"
            )
