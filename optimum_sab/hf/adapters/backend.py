"""What PEFT's newer methods ask of a format: the dense weight of a layer, if they need it. Imports PEFT."""

from __future__ import annotations

from typing import Any

import torch
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn

from optimum_sab.nn.adapted import AdaptedSABLinear
from optimum_sab.nn.linear import SABLinear


class PackedBackend(QuantizationBackend):
    """Of a layer that was packed when its adapter was made; it may have been dequantized since."""

    layer_type = "linear"
    supports_merge = False
    backend_name = "sab"

    def get_base_weight(self, base_layer: nn.Module) -> Tensor:
        """[out, in] in the dtype of the layer's activations."""
        if isinstance(base_layer, SABLinear):
            return dense_weight(base_layer)
        weight: Any = base_layer.weight
        return weight.detach()

    def set_base_weight(self, peft_layer: Any, weight_data: Tensor) -> None:
        """Only for a dequantized layer: merging into a packed one is refused before."""
        peft_layer.get_base_layer().weight.data = weight_data


def dense_weight(layer: SABLinear) -> Tensor:
    """Ŵ [out, in] in the dtype of the activations around the layer."""
    dtype = layer.compute_dtype if isinstance(layer, AdaptedSABLinear) else torch.float32
    return layer.packed.dequantize().to(dtype)
