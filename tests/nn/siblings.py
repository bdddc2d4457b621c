"""Layers as the solver makes them of linears with one input."""

import torch

from optimum_sab.core.settings import LayerSettings
from optimum_sab.format.packed_weight import PackedWeight
from optimum_sab.nn.input_group import SHARED
from optimum_sab.nn.linear import SABLinear
from optimum_sab.ops.verification import sample_weight

WIDTH = 140
DEFAULT = LayerSettings()


def siblings(sizes, settings=DEFAULT, width=WIDTH, bias=True):
    """Layers of these sizes: rows of one packed matrix."""
    whole = sample_weight(settings, sum(sizes), width).tensors
    layers, start = [], 0
    for number, size in enumerate(sizes):
        rows = slice(start, start + size)
        taken = {name: t.clone() if name in SHARED else _rows_of(name, t, rows) for name, t in whole.items()}
        generator = torch.Generator().manual_seed(number)
        packed = PackedWeight(taken, size, width, settings)
        packed.validate()
        layers.append(SABLinear.from_packed(packed, torch.randn(size, generator=generator) if bias else None))
        start += size
    return layers


def _rows_of(name, tensor, rows):
    axis = {"weight": 1, "residual_sign": 1, "row_scale": 2, "row_exponent": 0}[name]
    index = [slice(None)] * tensor.dim()
    index[axis] = rows
    return tensor[tuple(index)].contiguous()
