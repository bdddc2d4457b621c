"""One product with a packed weight: what is multiplied and where to, and what its launches have in common."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .arguments import MAX_STACK, Activations, Extent, PackedRows, Parts, layer_kind
from .device import DeviceTraits, device_traits
from .geometry import Geometry

MAX_SPLIT = 16


@dataclass(frozen=True)
class Product:
    """Layers stacked by rows, and one input.

    Args:
        x: [tokens, columns], fp32, bf16 or fp16, columns contiguous.
        tensors: the layers together, in the kernel layout (layout.py).
        geometry: of the layers together.
        sizes: rows of every layer.
        biases: [its rows] of every layer, contiguous, or none of any.
        outputs: contiguous [tokens, its rows] of every layer, to write to.
    """

    x: Tensor
    tensors: dict[str, Tensor]
    geometry: Geometry
    sizes: tuple[int, ...]
    biases: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    @property
    def tokens(self) -> int:
        return self.x.shape[0]

    @property
    def device(self) -> DeviceTraits:
        return device_traits(self.x.device)

    @property
    def inputs(self) -> Activations:
        """What is prepared for the kernels (prepare.py)."""
        scale = self.tensors["col_scale"]
        index = self.tensors.get("residual_index", scale)  # any pointer does where it is not read
        return Activations(self.x, scale, index, self.tokens, self.geometry.columns, self.x.stride(0))

    def arguments(self) -> dict[str, Any]:
        """What the kernels that multiply take of a product, whatever their way."""
        geometry, device = self.geometry, self.device
        ends = (*accumulate(self.sizes), *[geometry.rows] * MAX_STACK)
        return {
            "layer": PackedRows.of(self.tensors),
            "biases": _filled(self.biases or (self.tensors["weight"],)),
            "outputs": _filled(self.outputs),
            "tokens": self.tokens,
            "bounds": ends[: MAX_STACK - 1],
            "rows": geometry.rows,
            "extent": Extent(geometry.column_tiles, geometry.slot_tiles, geometry.blocks),
            "KIND": layer_kind(geometry, device),
            "HAS_BIAS": bool(self.biases),
            "STACK": len(self.sizes),
        }

    def split(self, programs: int, per_processor: int) -> int:
        """Parts of the columns: a power of two that brings ``programs`` near ``per_processor`` for every
        multiprocessor, with two tiles to a part."""
        split, wanted = 1, per_processor * self.device.processors
        while split < MAX_SPLIT and programs * split * 2 <= wanted and split * 4 <= self.geometry.column_tiles:
            split *= 2
        return split

    def parts(self, programs: int, split: int, size: int) -> Parts:
        """Room for the sums of ``split`` programs for each of ``programs`` outputs of ``size`` numbers."""
        counters = programs if split > 1 else 0
        total = self.space(counters * split * size, dtype=torch.float32)
        return Parts(total, self.space(counters, dtype=torch.int32))

    def space(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Memory on the device, not written."""
        return torch.empty(shape, dtype=dtype, device=self.x.device)


def _filled(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The tensors, and any to make them `MAX_STACK`."""
    return tensors + tensors[:1] * (MAX_STACK - len(tensors))
