"""How large a packed checkpoint will be, before there is a weight."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from optimum_sab.errors import SABWarning
from optimum_sab.format.layout import stored_bits_per_weight
from optimum_sab.hf.binarization import check_settings
from optimum_sab.hf.config import SABConfig
from optimum_sab.hf.selection import select
from optimum_sab.nn.selection import Selection
from optimum_sab.nn.unfusing import unfuse_experts


def expected_bytes(factory: Any, source: Any, config: SABConfig, dtype: torch.dtype | str) -> int:
    """Bytes that a packed checkpoint will take, from a model without weights, on which the settings are checked too.

    Args:
        factory: the model's class, or an auto class.
        source: the dense model's config.
        config: how it will be binarized.
        dtype: of what stays dense; "auto" for the dense model's own.

    Raises:
        ConfigError, CalibrationError, MissingDependencyError: a module rule fits nothing, or see `check_settings`.
    """
    with torch.device("meta"):
        model = factory.from_config(source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SABWarning)  # they come again with the weights
        selection = select(model, config, strict=True)
        check_settings(model, config)
    unfuse_experts(model, selection.experts)
    kept = dtype if isinstance(dtype, torch.dtype) else getattr(source, "dtype", None) or torch.float32
    return checkpoint_bytes(model, selection, kept, config.target_bits)


def checkpoint_bytes(model: nn.Module, selection: Selection, dtype: torch.dtype, target_bits: float | None) -> int:
    """Bytes of all tensors of the packed checkpoint, within a few per cent.

    Args:
        model: dense; its weights may be on meta.
        selection: the linears to be packed.
        dtype: of what stays dense.
        target_bits: `SABConfig.target_bits`; None where the settings decide.
    """
    bits = 0.0
    dense = {name: each.numel() for name, each in model.named_parameters()}  # a tied one counts once
    for name, settings in selection.settings.items():
        weight = model.get_parameter(f"{name}.weight")
        dense.pop(f"{name}.weight", None)
        rows, columns = weight.shape
        bits += weight.numel() * (target_bits or stored_bits_per_weight(rows, columns, settings))
    return round(bits / 8) + sum(dense.values()) * dtype.itemsize
