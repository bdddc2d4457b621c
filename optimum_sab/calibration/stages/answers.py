"""Remember what the dense model answers to samples that calibrate nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from optimum_sab.calibration.predictions.agreement import AgreementCheck
from optimum_sab.calibration.progress import OnStep
from optimum_sab.calibration.run import Run
from optimum_sab.calibration.samples.inputs import unseen_inputs
from optimum_sab.calibration.stage import Stage
from optimum_sab.errors import StreamError, warn


@dataclass(frozen=True)
class EvaluationSamples:
    """Forward arguments of somebody's own samples, by kind."""

    by_kind: Mapping[str, Sequence[Mapping[str, Any]]]


class RememberAnswers(Stage):
    """Leaves an `AgreementCheck` for `CompareAnswers`, where the model reads the samples for it.

    Of those of the package a model may read none, which a warning says; `EvaluationSamples` it has to read.
    """

    name: ClassVar[str] = "answers"
    by: ClassVar[int | None] = 0

    def apply(self, run: Run, on_step: OnStep) -> None:
        given = run.kept(EvaluationSamples)
        own = {} if given is None else given.by_kind
        try:
            self._remember(run, {**unseen_inputs(run.model, run.processor), **own})
            return
        except StreamError:
            raise
        except Exception as error:  # a model may take only samples of its own kind, and can be binarized all the same
            alone = " on the evaluation samples alone" if own else ""
            warn(
                f"the finished model will {'' if own else 'not '}be compared with the dense one{alone}, which does not "
                f"read the package's samples for that: {error}"
            )
        if own:
            self._remember(run, own)

    def _remember(self, run: Run, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        blocks = [run.model.get_submodule(name) for name in run.selection.blocks]
        run.keep(AgreementCheck(run.model, samples, blocks, run.options.device, run.bound()))
