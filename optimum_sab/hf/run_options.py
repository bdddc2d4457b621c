"""What a configuration asks of a run."""

from __future__ import annotations

import torch

from optimum_sab.calibration.options import AllocationSettings, RunOptions
from optimum_sab.calibration.samples.inputs import SampleSource
from optimum_sab.errors import ConfigError
from optimum_sab.hf.config import SABConfig


def run_options(config: SABConfig) -> RunOptions:
    """The options of `optimum_sab.calibration` that a configuration stands for.

    Raises:
        ConfigError: the calibration device cannot be used here.
    """
    by_sensitivity = config.allocation == "sensitivity"
    return RunOptions(
        source=SampleSource(config.calibration, config.calibration_samples, config.sequence_length, config.seed),
        calibration_pass=config.calibration_pass,
        device=_calibration_device(config),
        allocation=AllocationSettings.of(config.target_bits, config.dynamic) if by_sensitivity else None,
        refine=config.refine_settings,
        temperature_scaling=config.temperature_scaling,
        resume_folder=config.resume_folder,
        backend=config.backend,
    )


def _calibration_device(config: SABConfig) -> torch.device | None:
    if config.calibration_device is None:
        return None
    try:
        device = torch.device(config.calibration_device)
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the kind of device
        raise ConfigError(
            f"calibration_device={config.calibration_device!r} cannot be used here ({str(error).splitlines()[0]}); "
            "name a device of this machine, or leave it out to work where the model is."
        ) from error
