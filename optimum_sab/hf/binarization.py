"""From a loaded dense model and a configuration to a packed model: the list of stages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from optimum_sab.calibration.joining import joined, launched
from optimum_sab.calibration.pipeline import STAGES
from optimum_sab.calibration.progress import OnStep, no_step
from optimum_sab.calibration.report import BinarizationReport
from optimum_sab.calibration.run import Run
from optimum_sab.calibration.stage import Stage, check_stages, run_stages
from optimum_sab.calibration.stages.forward import LookAtForwards
from optimum_sab.calibration.stages.rehearsal import RehearseForward
from optimum_sab.hf.about import about
from optimum_sab.hf.config import SABConfig
from optimum_sab.hf.devices import computes_elsewhere
from optimum_sab.hf.early_rehearsal import RehearseUnloaded
from optimum_sab.hf.early_resume import LookIntoResumeFolder
from optimum_sab.hf.find_processor import FindProcessor, ReadEvaluation, ReadSamplesEarly, ReadUnseen
from optimum_sab.hf.hold_to_plan import HoldToPlan
from optimum_sab.hf.origin import Origin
from optimum_sab.hf.progress import READING_DELAY, shown_progress
from optimum_sab.hf.record import record
from optimum_sab.hf.run_options import run_options
from optimum_sab.hf.selection import select
from optimum_sab.nn.unfusing import unfuse_experts


def stages(
    config: SABConfig, origin: Origin | None = None, device_map: Any = None, on_read: OnStep = no_step
) -> tuple[Stage, ...]:
    """What is done to a dense model, in order. They remember what they find in `check`, so a run has its own.

    Args:
        config: the configuration.
        origin: where the model comes from; None to ask it.
        device_map: see `check_before_loading`.
        on_read: told how many samples are read.
    """
    processor = FindProcessor(config.processor, origin)
    unseen, reader = ReadUnseen(processor), ReadSamplesEarly(processor, on_read)
    written = run_options(config).source.written
    early = RehearseUnloaded(config, unseen if written else reader, computes_elsewhere(device_map))
    tried: tuple[Stage, ...] = (unseen, LookAtForwards(), RehearseForward()) if written else ()
    evaluation = ReadEvaluation(processor, reader)
    plan = HoldToPlan(config, (reader, unseen, evaluation), origin, device_map)
    return (processor, *tried, reader, evaluation, LookIntoResumeFolder(config, reader), plan, early, *STAGES)


def check_settings(model: nn.Module, config: SABConfig, here: bool = True) -> None:
    """Refuse what takes no time to see: of `check_before_loading` what needs no processor and no samples.

    Args:
        model: its weights may be on meta.
        config: the configuration.
        here: whether the run is this machine's.

    Raises:
        ConfigError, CalibrationError, MissingDependencyError: see `check_before_loading`.
    """
    with _on_cpu():
        check_stages(STAGES, model, run_options(config, here))


def check_before_loading(
    model: nn.Module, config: SABConfig, origin: Origin | None = None, device_map: Any = None
) -> tuple[Stage, ...]:
    """Refuse what can be seen to fail before a weight is read, calibration samples and their processor included.

    Args:
        model: its weights may be on meta.
        config: the configuration.
        origin: where the model comes from; None to ask it.
        device_map: where the weights will be, as `from_pretrained` takes it.

    Returns:
        The stages, for `binarize_loaded`: what was read is not read again.

    Raises:
        ConfigError: the calibration pass is not registered, the calibration device cannot be used here, or see
            `refuse_what_cannot_fit`.
        CalibrationError: see `head_to_tune_to` and `rehearse_unloaded`.
        SampleError: no processor is found, or a sample cannot be read or encoded.
        MissingDependencyError: see `import_greenlet`; or a package is missing that reads samples.
    """
    check_settings(model, config)
    with _on_cpu(), shown_progress("none" if launched()[0] else config.progress) as progress:
        beginning = stages(config, origin, device_map, progress.steps("Reading samples", "sample", READING_DELAY))
        check_stages([each for each in beginning if each not in STAGES], model, run_options(config))
    return beginning


def binarize_loaded(
    model: nn.Module, config: SABConfig, beginning: Sequence[Stage] | None = None
) -> BinarizationReport:
    """Binarize a dense model in place.

    Args:
        model: loaded.
        config: the configuration; what was chosen and measured is written into it.
        beginning: what `check_before_loading` gave; None for a model that is loaded already.

    Raises:
        ConfigError: the calibration device does not go with the model's device map, or see `check_before_loading`.
        CalibrationError: a weight is offloaded; see also the stages.
        RankError: see `optimum_sab.calibration.pipeline.binarize`.
    """
    with joined() as ranks, shown_progress(config.progress if ranks.first else "none") as progress:
        selection = select(model, config, strict=True)
        unfuse_experts(model, selection.experts)
        options = run_options(config)
        options = replace(options, device=ranks.device(options.device))
        run = Run(model, selection, options, progress, ranks=ranks)
        report = run_stages(run, stages(config) if beginning is None else beginning)
    record(config, run.selection, report)
    return replace(report, about=about(model, config))


@contextmanager
def _on_cpu() -> Iterator[None]:
    """Tensors are made as by default: Transformers 5 builds a model where they are on meta and in the model's dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)
