"""The stages of a run, in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from optimum_sab.calibration.joining import joined
from optimum_sab.calibration.options import RunOptions
from optimum_sab.calibration.report import BinarizationReport
from optimum_sab.calibration.resume.folder import ResumeFolder
from optimum_sab.calibration.resume.shared import SharedResumeFolder
from optimum_sab.calibration.run import Progress, Run, Silent
from optimum_sab.calibration.stage import Stage, run_stages
from optimum_sab.calibration.stages.agreement import AgreeOnRun
from optimum_sab.calibration.stages.allocation import AllocateBits, MeasureSensitivities
from optimum_sab.calibration.stages.answers import RememberAnswers
from optimum_sab.calibration.stages.blocks import SolveBlocks
from optimum_sab.calibration.stages.comparison import CompareAnswers
from optimum_sab.calibration.stages.examples import WriteAfter, WriteBefore
from optimum_sab.calibration.stages.forward import LookAtForwards
from optimum_sab.calibration.stages.head import FindHead
from optimum_sab.calibration.stages.preparation import PrepareLayers
from optimum_sab.calibration.stages.rehearsal import RehearseForward
from optimum_sab.calibration.stages.resume import OpenResumeFolder
from optimum_sab.calibration.stages.samples import GivenSamples
from optimum_sab.calibration.stages.sizes import MeasureSizes
from optimum_sab.calibration.stages.temperature import ScaleTemperature
from optimum_sab.calibration.stages.tuning import TuneModel
from optimum_sab.nn.selection import Selection

BINARIZE: tuple[Stage, ...] = (FindHead(), SolveBlocks(), ScaleTemperature(), TuneModel())
"""From a dense model with settings for every linear to a packed one."""

STAGES: tuple[Stage, ...] = (
    LookAtForwards(),
    RehearseForward(),
    AgreeOnRun(),
    RememberAnswers(),
    WriteBefore(),
    OpenResumeFolder(),
    MeasureSensitivities(),
    AllocateBits(),
    *BINARIZE,
    MeasureSizes(),
    PrepareLayers(),
    CompareAnswers(),
    WriteAfter(),
)
"""All of it, with samples that are read."""


def binarize(
    model: nn.Module,
    selection: Selection,
    samples: Sequence[Mapping[str, Any]],
    options: RunOptions | None = None,
    progress: Progress | None = None,
    resume: ResumeFolder | None = None,
) -> BinarizationReport:
    """Binarize the selected linears of ``model`` in place. After an error the model is half binarized: discard it.

    Where `torch.distributed` has several processes, all call this with the same arguments and share the work.

    Args:
        model: dense, every parameter on a real device.
        selection: what to binarize and how.
        samples: forward keyword arguments, one dict per sample (`encode_samples`).
        options: what else is asked for, of what concerns these stages; None for the defaults.
        progress: what is told how far it is; None for nobody.
        resume: keeps every finished block and the state of the tuning, so that the same call after an
            interruption goes on from there, to the same result.

    Raises:
        CalibrationError: no token goes through a linear that is not one of a few idle experts; see also
            `head_to_tune_to` and `ResumeFolder`.
        SampleError: no samples.
        NonFiniteError: a weight or an activation holds NaN or inf.
        LockstepError, SingularHessianError: see there.
        RankError: another process of the run has failed, is gone, or does another run.
    """
    options = options or RunOptions()
    with joined() as ranks:
        options = replace(options, device=ranks.device(options.device))
        shared = None if resume is None else SharedResumeFolder(resume.folder, resume, ranks)
        told = progress if progress is not None and ranks.first else Silent()
        run = Run(model, selection, options, told, shared, ranks=ranks)
        return run_stages(run, (GivenSamples(samples), AgreeOnRun(), *BINARIZE))
