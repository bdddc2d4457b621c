"""What a configuration asks of a run."""

from __future__ import annotations

from optimum_sab.calibration.options import AllocationSettings, RunOptions
from optimum_sab.calibration.samples.inputs import SampleSource, evaluation_source
from optimum_sab.hf.config import SABConfig
from optimum_sab.hf.devices import planned_device, usable_device


def run_options(config: SABConfig, here: bool = True) -> RunOptions:
    """The options of `optimum_sab.calibration` that a configuration stands for.

    Args:
        config: the configuration.
        here: whether the run is this machine's; a plan is also made for others.

    Raises:
        ConfigError: the calibration device cannot be used here, or is none.
    """
    named, device = config.calibration_device, usable_device if here else planned_device
    by_sensitivity = config.allocation == "sensitivity"
    return RunOptions(
        source=SampleSource(
            data=config.calibration,
            count=config.calibration_samples,
            sequence_length=config.sequence_length,
            seed=config.seed,
            builtin=config.builtin_samples,
        ),
        calibration_pass=config.calibration_pass,
        expert_tokens=config.expert_tokens,
        device=None if named is None else device("calibration_device", named),
        allocation=AllocationSettings.of(config.target_bits, config.dynamic) if by_sensitivity else None,
        refine=config.refine_settings,
        temperature_scaling=config.temperature_scaling,
        activation_memory=None if config.activation_memory is None else int(config.activation_memory * 2**30),
        resume_folder=config.resume_folder,
        backend=config.backend,
        examples=config.examples,
        evaluation=None if config.evaluation is None else evaluation_source(config.evaluation, config.sequence_length),
    )
