"""`SABHfQuantizer`: what `from_pretrained` and `save_pretrained` call."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer

from optimum_sab.errors import ConfigError, FormatError, SABWarning
from optimum_sab.hf.checkpoint import check_files, local_files
from optimum_sab.hf.compat import OFFLOADS_INTEGERS
from optimum_sab.hf.config import SABConfig
from optimum_sab.nn.input_group import group_linears
from optimum_sab.nn.linear import SABLinear
from optimum_sab.nn.selection import Selection, replace_with_skeletons, select_linears, set_module
from optimum_sab.ops.backends import choose_backend

if TYPE_CHECKING:
    from optimum_sab.calibration.agreement import AgreementCheck


class SABHfQuantizer(HfQuantizer):
    """Binarizes a dense checkpoint after it is loaded, or prepares the packed layers a packed checkpoint fills.

    Attributes:
        report: the `BinarizationReport` of the model this quantizer made; None for a loaded one.
    """

    requires_calibration = False  # True would refuse dense checkpoints, which is the main job
    requires_parameters_quantization = False  # Transformers 4.57
    required_packages = None

    def __init__(self, quantization_config: SABConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.report: Any = None

    # -- loading ---------------------------------------------------------------------------------------------------

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        device_map = kwargs.get("device_map")
        self._refuse_disk(device_map if isinstance(device_map, dict) else {})

    def _refuse_disk(self, device_map: Mapping[str, Any]) -> None:
        if "disk" not in device_map.values():
            return
        if self.pre_quantized and not OFFLOADS_INTEGERS:
            raise ConfigError(
                "device_map sends modules to disk, and this version of Transformers turns packed tensors into noise "
                "there; use Transformers 5, or a device_map without 'disk'."
            )
        if not self.pre_quantized:
            raise ConfigError(
                "device_map sends modules to disk, where they cannot be binarized; load on the CPU (device_map='cpu') "
                "and name the accelerator in SABConfig(calibration_device=...)."
            )

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        selection = self._select(model, strict=not self.pre_quantized)  # a bad rule stops here, before any download
        if self.pre_quantized:
            replace_with_skeletons(model, selection)
            files = kwargs.get("checkpoint_files") or local_files(_source(model))
            check_files(model, selection.prefix, [f for f in files if str(f).endswith(".safetensors")])
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        self._refuse_disk(getattr(model, "hf_device_map", {}))  # "auto" is only resolved by now
        check = None
        if not self.pre_quantized:
            check = self._binarize(model)
        else:
            for name, module in model.named_modules():
                if isinstance(module, SABLinear) and module.weight.device.type != "meta":
                    module.packed.validate(name)
            if self.quantization_config.dequantize:
                self._dequantize(model)
                self.remove_quantization_config(model)
                return model
        self._prepare(model)
        if check is not None:
            self._compare(check)
        config: Any = model.config
        config.quantization_config = self.quantization_config
        return model

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """Transformers 4.57: a packed tensor the checkpoint lacks would be made up; stop instead."""
        if self.pre_quantized:
            for key in missing_keys:
                stem, _, tensor = key.rpartition(".")
                owner = _submodule(model, stem)
                if isinstance(owner, SABLinear) and tensor != "bias":
                    raise FormatError(
                        f"{stem}: tensor {tensor!r} is missing; the checkpoint is incomplete, fetch it again."
                    )
        return missing_keys

    def _convert_model_for_quantization(self, model: nn.Module) -> None:
        """Nothing to convert; Transformers 4.57 would import accelerate here, which loading does not need."""

    # -- what Transformers asks ------------------------------------------------------------------------------------

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        return safe_serialization is not False

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on top: gradients reach the inputs of packed layers."""
        return True

    # -- work ------------------------------------------------------------------------------------------------------

    def _select(self, model: nn.Module, strict: bool) -> Selection:
        config = self.quantization_config
        rules = list(config.modules_to_not_convert)
        if not strict:
            rules += (config.measured or {}).get("left_dense", [])
        return select_linears(model, config.layer_settings, rules, config.dynamic, strict)

    def _binarize(self, model: nn.Module) -> AgreementCheck | None:
        """Binarize in place; returns what can compare the result with the dense model."""
        from optimum_sab.calibration.inputs import calibration_inputs
        from optimum_sab.calibration.modality import VISUAL, model_modalities
        from optimum_sab.calibration.pipeline import binarize
        from optimum_sab.hf.processor import find_processor
        from optimum_sab.hf.progress import shown_progress

        config = self.quantization_config
        selection = self._select(model, strict=True)
        choose_backend(next(model.parameters()).device, config.backend)  # an unusable one is refused before the work
        processor = find_processor(config.processor, _source(model), VISUAL in model_modalities(model.config))
        device = None if config.calibration_device is None else torch.device(config.calibration_device)
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
            check = self._agreement_check(model, processor)
            resume = self._resume_folder(model, selection, inputs)
            if config.allocation == "sensitivity":
                on_step = progress.steps("Allocating bits", "step")
                selection = self._allocate(model, selection, inputs, device, resume, on_step)
            self.report = binarize(
                model,
                selection,
                inputs,
                config.calibration_pass,
                device,
                progress.on_block,
                config.refine_settings,
                resume,
                progress.steps("Refining", "step"),
                config.temperature_scaling,
            )
        config.calibration = (
            config.calibration
            if isinstance(config.calibration, str)
            else (None if config.calibration is None else {"samples": len(inputs)})
        )
        config.processor = config.resume_folder = None
        config.measured = {
            "bits_per_weight": round(self.report.bits_per_weight, 6),
            "calibration_tokens": self.report.tokens,
            "left_dense": [_below_blocks(name, selection.prefix) for name in selection.left_dense],
        }
        if self.report.temperature is not None:
            config.measured["temperature"] = round(self.report.temperature.value, 4)
        if config.target_bits is not None:  # the choice stands in dynamic now
            config.measured["target_bits"], config.target_bits = config.target_bits, None
        return check

    def _agreement_check(self, model: nn.Module, processor: Any) -> AgreementCheck | None:
        """What the dense model says to a few samples that calibrate nothing."""
        from optimum_sab.calibration.agreement import AgreementCheck
        from optimum_sab.calibration.inputs import unseen_inputs

        try:
            return AgreementCheck(model, unseen_inputs(model, processor))
        except Exception as error:  # a model may take only samples of its own kind, and can be binarized all the same
            warnings.warn(
                "the finished model will not be compared with the dense one, which does not read the samples for that: "
                f"{error}",
                SABWarning,
                stacklevel=2,
            )
            return None

    def _compare(self, check: AgreementCheck) -> None:
        """Record how far the finished model is from the dense one, and say so where it is far."""
        try:
            found = check.measure()
        except (RuntimeError, ValueError) as error:  # out of memory, say: the finished model must not be lost to that
            warnings.warn(
                f"the finished model could not be compared with the dense one: {error}", SABWarning, stacklevel=2
            )
            return
        self.report = replace(self.report, agreement=found)
        self.quantization_config.measured["agreement"] = {
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

    def _resume_folder(self, model: nn.Module, selection: Selection, inputs: list[dict[str, Any]]) -> Any:
        from optimum_sab.calibration.resume import ResumeFolder, fingerprint

        config = self.quantization_config
        if config.resume_folder is None:
            return None
        marks = fingerprint(model, inputs, selection.settings, config.calibration_pass, config.refine_settings)
        own = ("allocation", "target_bits", "temperature_scaling")
        return ResumeFolder(config.resume_folder, {**marks, **{name: getattr(config, name) for name in own}})

    def _allocate(
        self,
        model: nn.Module,
        selection: Selection,
        inputs: list[dict[str, Any]],
        device: torch.device | None,
        resume: Any,
        on_step: Callable[[int, int], None],
    ) -> Selection:
        """Planes per group of linears, written into ``dynamic`` so that a reader finds them there."""
        from optimum_sab.calibration.allocation import PLANES, allocate

        config = self.quantization_config
        fixing = [rule for rule, changes in config.dynamic.items() if set(changes) & set(PLANES)]
        free = [name for name in selection.settings if not any(re.search(rule, name) for rule in fixing)]
        if not free:
            if config.target_bits is None:
                return selection
            raise ConfigError(
                f"target_bits={config.target_bits} has nothing to choose: dynamic sets the planes of every linear. "
                "Leave one of the two out."
            )

        def rules() -> dict[str, Any]:
            allocation = allocate(model, selection, free, inputs, config.target_bits, device, on_step)
            return allocation.rules(selection.prefix)

        config.dynamic = {**config.dynamic, **(rules() if resume is None else resume.rules(rules))}
        return self._select(model, strict=True)

    def _prepare(self, model: nn.Module) -> None:
        """Layers on an accelerator get the layout of its kernels, and those that share an input are grouped."""
        for module in model.modules():
            if isinstance(module, SABLinear):
                module.backend = self.quantization_config.backend
                module.prepare()
        group_linears(model)

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """Packed layers become dense linears in ``dtype`` (default: the model's)."""
        named: Any = dtype or getattr(model.config, "dtype", None) or getattr(model, "dtype", None)
        wanted: torch.dtype | None = getattr(torch, named) if isinstance(named, str) else named  # saving leaves a name
        for name, module in list(model.named_modules()):
            if isinstance(module, SABLinear):
                if module.weight.device.type == "meta":
                    raise ConfigError(f"{name} is offloaded; load the model without offload to dequantize it.")
                set_module(model, name, module.dequantize(wanted))
        return model


def _source(model: nn.Module) -> str:
    return getattr(model.config, "_name_or_path", "") or getattr(model.config, "name_or_path", "") or ""


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    return dict(model.named_modules()).get(name)


def _below_blocks(name: str, prefix: str) -> str:
    """The name from the block list's last part on, which holds whatever prefix the model is loaded under."""
    return name[len(prefix) - len(prefix.rpartition(".")[2]) :]
