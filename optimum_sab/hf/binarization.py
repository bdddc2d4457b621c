"""From a loaded dense model and a configuration to a packed model: the list of stages."""

from __future__ import annotations

from torch import nn

from optimum_sab.calibration.pipeline import STAGES
from optimum_sab.calibration.report import BinarizationReport
from optimum_sab.calibration.run import Run
from optimum_sab.calibration.stage import Stage, check_stages, run_stages
from optimum_sab.hf.config import SABConfig
from optimum_sab.hf.find_processor import FindProcessor
from optimum_sab.hf.progress import shown_progress
from optimum_sab.hf.record import record
from optimum_sab.hf.run_options import run_options
from optimum_sab.hf.selection import select


def stages(config: SABConfig) -> tuple[Stage, ...]:
    """What is done to a dense model, in order."""
    return (FindProcessor(config.processor), *STAGES)


def check_before_loading(model: nn.Module, config: SABConfig) -> None:
    """Refuse what can be seen to fail before a weight is read.

    Args:
        model: its weights may be on meta.
        config: the configuration.

    Raises:
        ConfigError: the calibration pass is not registered, or the calibration device cannot be used here.
        CalibrationError: see `head_to_tune_to`.
        MissingDependencyError: see `import_greenlet`.
    """
    check_stages(stages(config), model, run_options(config))


def binarize_loaded(model: nn.Module, config: SABConfig) -> BinarizationReport:
    """Binarize a dense model in place.

    Args:
        model: loaded.
        config: the configuration; what was chosen and measured is written into it.

    Raises:
        ConfigError: the calibration device does not go with the model's device map, or see `check_before_loading`.
        CalibrationError: a weight is offloaded; see also the stages.
    """
    with shown_progress(config.progress) as progress:
        run = Run(model, select(model, config, strict=True), run_options(config), progress)
        report = run_stages(run, stages(config))
    record(config, run.selection, report)
    return report
