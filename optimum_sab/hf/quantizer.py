"""`SABHfQuantizer`: what `from_pretrained` and `save_pretrained` call."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer

from optimum_sab.errors import ConfigError, FormatError, warn, warnings_heard
from optimum_sab.hf.checkpoint import check_dense, check_layers
from optimum_sab.hf.compat import OFFLOADS_INTEGERS, RENAMES, TAKES_LOAD_OPTIONS
from optimum_sab.hf.config import SABConfig
from optimum_sab.hf.devices import check_device_map
from optimum_sab.hf.finite import check_finite
from optimum_sab.hf.hub.base import describe_base
from optimum_sab.hf.hub.companions import write_companions
from optimum_sab.hf.hub.processor_files import ProcessorSource
from optimum_sab.hf.hub.remote_code import forget_remote_code
from optimum_sab.hf.marks import forget_quantized
from optimum_sab.hf.one_save import check_one_save
from optimum_sab.hf.origin import loading_call, origin_of
from optimum_sab.hf.parallel import refuse_split
from optimum_sab.hf.recipe import as_recipe
from optimum_sab.hf.saving import describe_save, refuse_wrapped, state_to_save
from optimum_sab.hf.selection import select
from optimum_sab.hf.sharing import Sharing
from optimum_sab.hf.stored_files import SAVE_KEY, StoredFile, described, local_files, read_headers
from optimum_sab.hf.stored_names import StoredNames, spare_packed
from optimum_sab.hf.streaming import Streaming, check_stored, check_streaming
from optimum_sab.hf.verification import verify_loaded
from optimum_sab.nn.decoder import BlockLists
from optimum_sab.nn.dense_share import warn_of_dense
from optimum_sab.nn.linear import SABLinear
from optimum_sab.nn.modules import set_module
from optimum_sab.nn.preparation import prepare_layers
from optimum_sab.nn.scratch import Scratch
from optimum_sab.nn.selection import replace_with_skeletons, warn_of_idle_rules
from optimum_sab.nn.shared import refuse_shares
from optimum_sab.nn.streamed import streamed
from optimum_sab.nn.unfusing import experts_unfused, fuse_experts, unfuse_experts


class SABHfQuantizer(HfQuantizer):
    """Binarizes a dense checkpoint after it is loaded, or prepares the packed layers a packed checkpoint fills.

    Attributes:
        report: the `BinarizationReport` of the model this quantizer made; None for a loaded one.
        processor: where the processor is that is saved along.
    """

    requires_calibration = False  # True would refuse dense checkpoints, which is the main job
    requires_parameters_quantization = False  # Transformers 4.57
    required_packages = None

    def __init__(self, quantization_config: SABConfig, **kwargs: Any) -> None:
        # a copy: the work writes into it, and whoever gave it may load with it again
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        self.report: Any = None
        self.processor = ProcessorSource()  # what is saved along
        self._base: dict[str, str] = {}  # of a model that is binarized
        self._stages: Any = None  # with what they found before the weights were read
        self._heard: list[str] = []  # what was warned of before the weights were read
        self._files: list[StoredFile] = []  # these four while a packed checkpoint is loaded
        self._names = StoredNames({})
        self._missing: tuple[str, ...] = ()  # what Transformers makes up
        self._lists = BlockLists(())
        self._sharing: Sharing | None = None  # while one is loaded of which every process has a share
        self.streaming: Streaming | None = None  # while a dense checkpoint is loaded whose blocks stay in their files
        if self.pre_quantized:
            self.quantization_config.refuse_call_settings()
        else:
            as_recipe(self.quantization_config)

    # -- loading ---------------------------------------------------------------------------------------------------

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        call = loading_call() or {}
        refuse_split(call, self.pre_quantized, bool(self.quantization_config.dequantize))
        if self.pre_quantized and not TAKES_LOAD_OPTIONS:
            self._take_load_options(call.get("quantization_config"))
        device_map = kwargs.get("device_map")
        check_device_map(device_map)
        self._refuse_disk(device_map if isinstance(device_map, dict) else {})
        if self._streams:
            check_streaming(call, device_map)

    @property
    def _streams(self) -> bool:
        return self.quantization_config.stream_weights and not self.pre_quantized

    def _take_load_options(self, given: Any) -> None:
        """Transformers 4.57 says that nothing of a configuration counts which is given for a packed checkpoint."""
        options = given.get_loading_attributes() if isinstance(given, SABConfig) else {}
        for name, value in options.items():
            setattr(self.quantization_config, name, value)
        if options:
            warn(f"of the given SABConfig, {', '.join(options)} are used, and nothing else.")

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
                "and name the accelerator in SABConfig(calibration_device=...). Where the model does not fit into "
                "memory, SABConfig(stream_weights=True) without a device_map reads one decoder block at a time."
            )

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        selection = select(model, self.quantization_config, strict=not self.pre_quantized)  # a bad rule stops here
        if not self.pre_quantized:
            from optimum_sab.hf.binarization import check_before_loading

            origin = origin_of(model)
            if self._streams:
                check_stored(origin.files)
            with warnings_heard() as self._heard, experts_unfused(model, selection.experts):
                warn_of_idle_rules(model, selection, self.quantization_config.modules_to_not_convert)
                warn_of_dense(model, selection)
                device_map = kwargs.get("device_map")
                self._stages = check_before_loading(model, self.quantization_config, origin, device_map)
            self.processor = ProcessorSource(self.quantization_config.processor, origin)
            self._base = describe_base(origin)
            if self._streams:
                scratch = Scratch(self.quantization_config.resume_folder)
                self.streaming = Streaming(selection.blocks, origin.files or (), scratch)
        else:
            self.processor = ProcessorSource(None, origin_of(model))
            unfuse_experts(model, selection.experts)
            replace_with_skeletons(model, selection)
            self._lists = selection.lists
            self._sharing = Sharing.planned(model, loading_call() or {})
            if not RENAMES:
                self._check_files(model, None)
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module) -> list[Any]:
        """Transformers 5: told how the checkpoint's tensors are renamed and changed on their way into the model."""
        transforms: list[Any] = super().update_weight_conversions(weight_conversions, model)
        if not self.pre_quantized:
            return transforms
        transforms = spare_packed(transforms, model)
        self._check_files(model, transforms)
        return [*transforms, *self._names.corrections]

    def _check_files(self, model: nn.Module, transforms: list[Any] | None) -> None:
        """Everything that can be seen before a tensor is loaded; see the functions for what they raise."""
        given = (loading_call() or {}).get("state_dict")
        if given is not None:  # in the place of files
            self._check_headers(model, [described(given)], transforms)
            return
        origin = origin_of(model)
        found = origin.files
        if found is None and origin.name and Path(origin.name).is_dir():
            found = local_files(Path(origin.name))
        if found is None:
            return
        files = [str(file) for file in found if str(file).endswith(".safetensors")]
        if found and not files:
            raise FormatError(
                f"{Path(found[0]).name} is no safetensors file, and packed checkpoints are read from those alone; save "
                "the model again with save_pretrained."
            )
        self._files = read_headers(files)
        check_one_save(self._files, self.quantization_config.saved_as)
        self._check_headers(model, self._files, transforms)

    def _check_headers(self, model: nn.Module, files: list[StoredFile], transforms: list[Any] | None) -> None:
        self._names = check_layers(model, self._lists, files, transforms)
        if not (loading_call() or {}).get("ignore_mismatched_sizes"):
            check_dense(model, files, self._names)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        self._refuse_disk(getattr(model, "hf_device_map", {}))  # "auto" is only resolved by now
        if not self.pre_quantized:
            from optimum_sab.hf.binarization import binarize_loaded

            beginning, self._stages = self._stages, None
            streaming, self.streaming = self.streaming or Streaming((), ()), None
            with streamed(model, streaming.sources, streaming.scratch):
                report = binarize_loaded(model, self.quantization_config, beginning)
            self.report = replace(report, warnings=tuple(dict.fromkeys((*self._heard, *report.warnings))))
            if self._base:
                self.quantization_config.measured["base"] = self._base
            transforms = getattr(model, "_weight_conversions", None)
            if transforms is not None:  # of the dense checkpoint; saving undoes them
                model._weight_conversions = spare_packed(transforms, model)  # type: ignore[assignment]
        else:
            self._check_content(model)
            if self.quantization_config.dequantize:
                self._dequantize(model)
                self.remove_quantization_config(model)
                return model
            if self._sharing is not None:
                self._sharing.place(model)
                self._sharing = None
            prepare_layers(model, self.quantization_config.backend)
        config: Any = model.config
        config.quantization_config = self.quantization_config
        return model

    def _check_content(self, model: nn.Module) -> None:
        wanted = self.quantization_config.verify
        if wanted:
            verify_loaded(model, self._files, self._names.keys, rest=wanted == "all")
        for name, module in model.named_modules():
            shared = self._sharing is not None and self._sharing.holds(name)  # looked at when each has its share
            if isinstance(module, SABLinear) and module.weight.device.type != "meta" and not shared:
                module.packed.validate(name)
        if RENAMES:
            self._missing = tuple(model.state_dict().keys() - self._names.keys.keys())
        check_finite(model, self._files, self._missing)
        self._files, self._names, self._missing = [], StoredNames({}), ()

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """Transformers 4.57: a packed tensor the checkpoint lacks would be made up; stop instead."""
        self._missing = tuple(missing_keys)
        if self.pre_quantized:
            for key in missing_keys:
                stem, _, tensor = key.rpartition(".")
                owner = _submodule(model, stem)
                if isinstance(owner, SABLinear):
                    raise FormatError(
                        f"{stem}: tensor {tensor!r} is missing; the checkpoint is incomplete, fetch it again."
                    )
        return missing_keys

    def _convert_model_for_quantization(self, model: nn.Module) -> None:
        """Nothing to convert; Transformers 4.57 would import accelerate here, which loading does not need."""

    # -- what Transformers asks ------------------------------------------------------------------------------------

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        if safe_serialization is False:  # Transformers 4.57, whose error then says to look at the warnings
            warn("packed models are saved as safetensors only; leave safe_serialization=False out.")
        return safe_serialization is not False

    @property
    def is_compileable(self) -> bool:
        """Generation with a static cache compiles the model by itself, where there is a GPU."""
        return True

    def get_accelerator_warm_up_factor(self) -> int:
        """Transformers 4.57: 2 has it reserve what the model takes; packed layers have their true size by then."""
        return 2

    def get_state_dict_and_metadata(
        self, model: nn.Module, safe_serialization: bool | None = None
    ) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """Asked when the model is saved: its files and its config are to say which save they are of."""
        adapters_only = getattr(model, "_hf_peft_config_loaded", False)
        if adapters_only or not any(isinstance(module, SABLinear) for module in model.modules()):
            return None, {}
        refuse_shares(model, "saved")
        refuse_wrapped(model)
        metadata = describe_save(model)
        config: Any = model.config
        for each in (self.quantization_config, config.quantization_config):
            each.saved_as = metadata[SAVE_KEY]
        write_companions(model, self.quantization_config, self.processor)
        return state_to_save(model), metadata

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on top: gradients reach the inputs of packed layers."""
        return True

    # -- work ------------------------------------------------------------------------------------------------------

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """Packed layers become dense linears in ``dtype`` (default: the model's)."""
        named: Any = dtype or getattr(model.config, "dtype", None) or getattr(model, "dtype", None)
        wanted: torch.dtype | None = getattr(torch, named) if isinstance(named, str) else named  # saving leaves a name
        refuse_shares(model, "dequantized")
        for name, module in list(model.named_modules()):
            if isinstance(module, SABLinear):
                if module.weight.device.type == "meta":
                    raise ConfigError(f"{name} is offloaded; load the model without offload to dequantize it.")
                set_module(model, name, module.dequantize(wanted))
        fuse_experts(model)
        if hasattr(model, "_weight_conversions"):  # which spare packed layers; 5.24 forgets them here by itself
            del model._weight_conversions
        forget_quantized(model)
        forget_remote_code(model.config)
        return model


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    return dict(model.named_modules()).get(name)
