"""How Transformers is told to read a packed layer's tensors when several processes share the layer.

A style of its plan says how a linear's parameters are cut, by their last dimensions. A packed layer has other tensors,
each with a style of its own here, beside the linear's, which goes on to say what happens around the layer. Needs
Transformers 5.24; nothing else imports what is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
from transformers.distributed.tensor_parallel import TensorParallelLayer

from optimum_sab.format.share import COLUMN_DIMENSIONS, ROW_DIMENSIONS
from optimum_sab.nn.linear import SABLinear

ROWS = ("colwise", "colwise_gather_output", "colwise_rep", "packed_colwise")  # of the transposed weight: [out, in] here
COLUMNS = ("rowwise", "rowwise_split_input", "rowwise_rep")
FUSED = "packed_colwise"  # two matrices, one above the other, and of each its share
_OURS = "sab_"


class PackedTensor(TensorParallelLayer):
    """One tensor of a packed layer: it is cut along its own dimension while it is read, or read whole.

    Args:
        style: Transformers' name of the layer's style, by which the same parameter of a dense linear is cut. Rules name
            all blocks at once, and one of them may have kept its linear dense.
    """

    def __init__(self, style: str) -> None:
        self.style = style
        self.dimensions: Mapping[str, int] = ROW_DIMENSIONS if style in ROWS else COLUMN_DIMENSIONS

    def shard_param(self, module: nn.Module, param: str, mesh: Any) -> None:
        if not isinstance(module, SABLinear):
            ALL_PARALLEL_STYLES[self.style].shard_param(module, param, mesh)
            return
        dimension = self.dimensions.get(param)
        if dimension is None:
            return
        placement = _StridedShard(dimension, split_factor=2) if self.style == FUSED else Shard(dimension)
        shared = distribute_tensor(module.get_parameter(param), mesh, [placement], src_data_rank=None)
        module.register_parameter(param, nn.Parameter(shared, requires_grad=False))


def style_of_tensors(style: str) -> str:
    """The name of the style of a packed layer's tensors, where the layer has this one; it is registered by now."""
    name = f"{_OURS}{style}"
    if name not in ALL_PARALLEL_STYLES:
        ALL_PARALLEL_STYLES.register(name, PackedTensor(style))
    return name
