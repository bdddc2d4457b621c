"""From a dense model and a configuration to a packed model and the record of what was done."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from optimum_sab.calibration.agreement import AgreementCheck
from optimum_sab.calibration.allocation import PLANES, allocate
from optimum_sab.calibration.inputs import calibration_inputs, unseen_inputs
from optimum_sab.calibration.lockstep import import_greenlet
from optimum_sab.calibration.memory import warn_of_memory
from optimum_sab.calibration.modality import VISUAL, model_modalities
from optimum_sab.calibration.passes import calibration_pass
from optimum_sab.calibration.pipeline import BinarizationReport, binarize, refuse_offloaded, runs_two_streams
from optimum_sab.calibration.refine.whole_model import head_to_tune_to
from optimum_sab.calibration.resume import ResumeFolder, fingerprint
from optimum_sab.errors import ConfigError, SABWarning
from optimum_sab.hf.config import SABConfig, describe_calibration
from optimum_sab.hf.processor import find_processor
from optimum_sab.hf.progress import Progress, shown_progress
from optimum_sab.hf.selection import select, source_of
from optimum_sab.nn.selection import Selection
from optimum_sab.ops.backends import choose_backend


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
    import_greenlet()
    calibration_pass(config.calibration_pass)
    _calibration_device(config)
    if config.refine_settings is not None and config.refine_settings.steps:
        head_to_tune_to(model)


class Binarization:
    """One model on its way.

    Args:
        model: dense, loaded; binarized in place.
        config: the configuration; what was chosen and measured is written into it.
        selection: the linears.

    Raises:
        ConfigError: ``config.calibration_device`` does not go with the model's device map.
        CalibrationError: a weight is offloaded.
    """

    def __init__(self, model: nn.Module, config: SABConfig, selection: Selection) -> None:
        self._model = model
        self._config = config
        self._selection = selection
        self._device = _calibration_device(config)
        _refuse_spread(model, self._device)
        refuse_offloaded(model, selection)

    def run(self) -> None:
        """Binarize."""
        model, config = self._model, self._config
        choose_backend(next(model.parameters()).device, config.backend)  # an unusable one is refused before the work
        processor = find_processor(config.processor, source_of(model), VISUAL in model_modalities(model.config))
        with shown_progress(config.progress) as progress:
            inputs = calibration_inputs(
                model,
                processor,
                config.calibration,
                config.calibration_samples,
                config.sequence_length,
                config.seed,
                progress.steps("Writing samples", "answer"),
            )
            two_streams = runs_two_streams(self._selection, config.refine_settings)
            warn_of_memory(model, self._selection, inputs, self._device, two_streams)
            self._check = self._agreement_check(processor)
            resume = self._resume_folder(inputs)
            self._allocate(inputs, resume, progress)
            self._report = binarize(
                model,
                self._selection,
                inputs,
                config.calibration_pass,
                self._device,
                progress.on_block,
                config.refine_settings,
                resume,
                progress.steps("Refining", "step"),
                config.temperature_scaling,
            )
        described = describe_calibration(config.calibration)
        config.calibration = {"samples": len(inputs)} if isinstance(described, dict) else described
        config.processor = config.resume_folder = None
        config.measured = self._measured()
        if config.target_bits is not None:  # the choice stands in dynamic now
            config.measured["target_bits"], config.target_bits = config.target_bits, None

    def compared(self) -> BinarizationReport:
        """Let the finished model, prepared for the device it is on, read what the dense one has read.

        How far it is from the dense one is recorded, and warned of where it is far.
        """
        if self._check is None:
            return self._report
        try:
            found = self._check.measure()
        except (RuntimeError, ValueError) as error:  # out of memory, say: the finished model must not be lost to that
            warnings.warn(
                f"the finished model could not be compared with the dense one: {error}", SABWarning, stacklevel=2
            )
            return self._report
        self._config.measured["agreement"] = {  # type: ignore[index]  # run() has written it
            kind: {"kl": round(each.kl, 4), "top1": round(each.top1, 4)} for kind, each in found.items()
        }
        for kind, each in found.items():
            if each.far:
                warnings.warn(
                    f"the binarized model is far from the dense one on {kind} that did not calibrate it: {each}. It "
                    "has lost what the calibration samples do not show: give more or more varied ones (some of "
                    "optimum_sab.data.builtin.builtin_samples among them), or more bits (SABConfig.two_bit()).",
                    SABWarning,
                    stacklevel=2,
                )
        return replace(self._report, agreement=found)

    def _agreement_check(self, processor: Any) -> AgreementCheck | None:
        """What the dense model says to a few samples that calibrate nothing."""
        try:
            return AgreementCheck(self._model, unseen_inputs(self._model, processor))
        except Exception as error:  # a model may take only samples of its own kind, and can be binarized all the same
            warnings.warn(
                "the finished model will not be compared with the dense one, which does not read the samples for that: "
                f"{error}",
                SABWarning,
                stacklevel=2,
            )
            return None

    def _resume_folder(self, inputs: list[dict[str, Any]]) -> ResumeFolder | None:
        config = self._config
        if config.resume_folder is None:
            return None
        settings = self._selection.settings
        marks = fingerprint(self._model, inputs, settings, config.calibration_pass, config.refine_settings)
        own = {name: getattr(config, name) for name in ("allocation", "target_bits", "temperature_scaling")}
        return ResumeFolder(config.resume_folder, {**marks, **own, "free_linears": dict.fromkeys(self._free(), True)})

    def _free(self) -> list[str]:
        """The linears whose planes no rule sets."""
        fixing = [rule for rule, changes in self._config.dynamic.items() if set(changes) & set(PLANES)]
        return [name for name in self._selection.settings if not any(re.search(rule, name) for rule in fixing)]

    def _allocate(self, inputs: list[dict[str, Any]], resume: ResumeFolder | None, progress: Progress) -> None:
        """Planes per group of linears, written into ``dynamic`` so that a reader finds them there."""
        config, selection, free = self._config, self._selection, self._free()
        if config.allocation != "sensitivity":
            return
        if not free:
            if config.target_bits is None:
                return
            raise ConfigError(
                f"target_bits={config.target_bits} has nothing to choose: dynamic sets the planes of every linear. "
                "Leave one of the two out."
            )
        on_step = progress.steps("Allocating bits", "step")

        def rules() -> dict[str, Any]:
            allocation = allocate(self._model, selection, free, inputs, config.target_bits, self._device, on_step)
            return allocation.rules(selection.prefix)

        config.dynamic = {**config.dynamic, **(rules() if resume is None else resume.rules(rules))}
        self._selection = select(self._model, config, strict=True)

    def _measured(self) -> dict[str, Any]:
        selection, report = self._selection, self._report
        measured: dict[str, Any] = {
            "bits_per_weight": round(report.bits_per_weight, 6),
            "calibration_tokens": report.tokens,
            "left_dense": [_below_blocks(name, selection.prefix) for name in selection.left_dense],
        }
        if report.temperature is not None:
            measured["temperature"] = round(report.temperature.value, 4)
        return measured


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


def _refuse_spread(model: nn.Module, device: torch.device | None) -> None:
    """Weights that a device map has spread are moved about by its hooks already."""
    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    if device is not None and len(places) > 1:
        raise ConfigError(
            f"calibration_device={str(device)!r} cannot be used with a device_map over {', '.join(sorted(places))}: "
            "the blocks are worked on where they are then. Leave calibration_device out, or load with device_map='cpu'."
        )


def _below_blocks(name: str, prefix: str) -> str:
    """The name from the block list's last part on, which holds whatever prefix the model is loaded under."""
    return name[len(prefix) - len(prefix.rpartition(".")[2]) :]
