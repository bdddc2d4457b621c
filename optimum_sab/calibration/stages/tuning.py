"""Tune the whole binarized model to the dense one's predictions."""

from __future__ import annotations

from typing import ClassVar

from optimum_sab.calibration.predictions.at_head import AtHead
from optimum_sab.calibration.progress import OnStep
from optimum_sab.calibration.refine.tuning import Tuning, TuningSample, tune
from optimum_sab.calibration.refine.tuning_store import FolderTuningStore
from optimum_sab.calibration.refine.whole_model import adopt, make_student
from optimum_sab.calibration.run import Run
from optimum_sab.calibration.stage import Stage


class TuneModel(Stage):
    """Trains scales, norms and biases; the model is left as it is where nothing beats that."""

    name: ClassVar[str] = "tuning"
    title: ClassVar[str] = "Refining"

    def wanted(self, run: Run) -> bool:
        return run.options.tuned

    def apply(self, run: Run, on_step: OnStep) -> Tuning:
        at_head, refine = run.take(AtHead), run.options.refine
        assert at_head is not None and refine is not None
        student = make_student(run.model, run.dtype, run.options.device)
        samples = {
            i: TuningSample(run.samples.inputs[i], at_head.teacher(i), run.samples.modalities[i])
            for i in run.samples.own
        }
        store = None if run.resume is None else FolderTuningStore(run.resume)
        outcome = tune(student, samples, refine.steps, store, on_step, run.ranks)
        if outcome.improved:
            adopt(student, run.ranks)
        return outcome
