"""How large a packed checkpoint will be, before there is a weight."""

from __future__ import annotations

import torch
from torch import nn

from optimum_sab.format.layout import stored_bits_per_weight
from optimum_sab.nn.selection import Selection


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
