"""Open the folder that keeps what an interrupted run has finished."""

from __future__ import annotations

from typing import Any, ClassVar

from optimum_sab.calibration.progress import OnStep
from optimum_sab.calibration.resume.fingerprint import Fingerprint, WeightsDigest, fingerprint
from optimum_sab.calibration.resume.folder import ResumeFolder
from optimum_sab.calibration.resume.shared import SharedResumeFolder
from optimum_sab.calibration.run import Run
from optimum_sab.calibration.stage import Stage


class OpenResumeFolder(Stage):
    """From here on `Run.resume` is there. Comes behind the samples, which are part of what tells runs apart."""

    name: ClassVar[str] = "resume"

    def wanted(self, run: Run) -> bool:
        return run.options.resume_folder is not None

    def apply(self, run: Run, on_step: OnStep) -> None:
        assert run.options.resume_folder is not None
        folder, agreed = run.options.resume_folder, run.kept(Fingerprint)
        own = None
        if run.ranks.first:
            marks = agreed.marks if agreed else self._marks(run)
            own = ResumeFolder(folder, marks)
        run.resume = SharedResumeFolder(folder, own, run.ranks)

    def _marks(self, run: Run) -> dict[str, Any]:
        weights = run.kept(WeightsDigest) or WeightsDigest.of(run.model)
        return fingerprint(weights, run.selection, run.samples.inputs, run.options)
