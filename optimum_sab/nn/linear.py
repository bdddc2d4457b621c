"""`SABLinear`: a linear layer whose weight is stored as packed binary planes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from optimum_sab.core.settings import LayerSettings
from optimum_sab.format.layout import tensor_specs
from optimum_sab.format.packed_weight import PackedWeight
from optimum_sab.ops.reference import binary_linear


class SABLinear(nn.Module):
    """Drop-in for `torch.nn.Linear` at inference: ``y = x Ŵᵀ + b``, gradients to x only.

    The stored tensors are parameters without gradients under the names of docs/format.md; ``weight`` holds the packed
    base signs. All are integers, so ``.half()`` and ``.to(dtype)`` change nothing but the bias.

    Args:
        in_features: columns of the weight.
        out_features: rows of the weight.
        settings: what the stored shapes follow from.
        bias: whether there is a bias.
        device: where the (uninitialised) tensors are made; "meta" for a skeleton that a loader fills.
        dtype: dtype of the bias.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        settings: LayerSettings,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.settings = settings
        for name, spec in tensor_specs(out_features, in_features, settings).items():
            self._store(name, torch.zeros(spec.shape, dtype=spec.dtype, device=device))
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device), requires_grad=False)
        else:
            self.register_parameter("bias", None)

    @classmethod
    def from_packed(cls, packed: PackedWeight, bias: Tensor | None = None) -> SABLinear:
        """The layer that holds these tensors (not copied)."""
        layer = cls(packed.in_features, packed.out_features, packed.settings, bias is not None, device="meta")
        for name, tensor in packed.tensors.items():
            layer._store(name, tensor)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return layer

    def _store(self, name: str, tensor: Tensor) -> None:
        # parameters, all of them: loaders that offload to disk bring back parameters only
        self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    @property
    def packed(self) -> PackedWeight:
        """The stored tensors as a `PackedWeight` (views, not copies)."""
        names = tensor_specs(self.out_features, self.in_features, self.settings)
        tensors = {name: getattr(self, name).detach() for name in names}
        return PackedWeight(tensors, self.out_features, self.in_features, self.settings)

    @property
    def bits_per_weight(self) -> float:
        """From the bytes of every stored tensor of the layer, bias included."""
        stored = self.packed.stored_bytes
        if self.bias is not None:
            stored += self.bias.numel() * self.bias.element_size()
        return 8.0 * stored / (self.out_features * self.in_features)

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """An ordinary linear with the weight Ŵ [out, in] in ``dtype`` (default float32)."""
        dtype = dtype or torch.float32
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        dense.weight = nn.Parameter(self.packed.dequantize().to(dtype), requires_grad=False)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().to(dtype), requires_grad=False)
        return dense

    def forward(self, inputs: Tensor) -> Tensor:
        """``x`` [..., in] → [..., out] in x's dtype."""
        return binary_linear(inputs, self.packed, self.bias)

    def extra_repr(self) -> str:
        s = self.settings
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"planes={s.base_planes}+{s.residual_planes}, block_size={s.block_size}, row_scale={s.row_scale}"
        )
