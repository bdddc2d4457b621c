"""`SABLinear`: a linear layer whose weight is stored as packed binary planes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from optimum_sab.core.code import NO_CODE
from optimum_sab.core.settings import LayerSettings
from optimum_sab.errors import ConfigError
from optimum_sab.format.layout import tensor_specs
from optimum_sab.format.packed_weight import PackedWeight
from optimum_sab.nn.layer_group import LayerGroup
from optimum_sab.ops.backends import backend_name
from optimum_sab.ops.cpu.direct import DirectLinear, only_values
from optimum_sab.ops.operator import binary_linear
from optimum_sab.ops.shape import LayerShape


class SABLinear(nn.Module):
    """Drop-in for `torch.nn.Linear` at inference: ``y = x Ŵᵀ + b``, gradients to x and the bias only.

    The packed tensors are parameters without gradients under the names of docs/format.md; ``weight`` holds the packed
    base signs. All are integers, so ``.half()`` and ``.to(dtype)`` change nothing but the bias.

    They are in one of two layouts: ``"stored"``, as in files, which the CPU computes with, or ``"kernel"``, which the
    Triton kernels read. `to_layout` converts in place. It happens by itself: to the kernel layout when the layer comes
    to a device on which Triton computes, and back whenever the layer is moved, saved or loaded into, so a state dict
    always holds the stored tensors.

    Args:
        in_features: columns of the weight.
        out_features: rows of the weight.
        settings: what the stored shapes follow from.
        bias: whether there is a bias.
        device: where the (uninitialised) tensors are made; "meta" for a skeleton that a loader fills.
        dtype: dtype of the bias.

    Attributes:
        backend: what computes (`optimum_sab.ops.backends`); None leaves it to the device.
        layout: of the packed tensors.
        kind: its `LayerShape.text`.
        group: the layers that share this one's input and are computed with it in one launch, or None.
        direct: the way to the CPU kernel past the dispatcher.
        counted: how many weights of the model it stands for; of a layer that processes share, all of them.
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
        self.counted = out_features * in_features
        self.backend: str | None = None
        self.layout = "stored"
        self.group: LayerGroup | None = None
        self.shape = LayerShape.of(out_features, in_features, settings)
        # kept, so that torch.compile neither traces how they are found nor guards every number
        self._names, self.kind = self.shape.names, self.shape.text
        self.direct = DirectLinear(self.shape)
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
    def tensors(self) -> list[Tensor]:
        """The packed tensors as they are, in the order of ``self.shape.names``."""
        return [self._parameters[name] for name in self._names]  # type: ignore[misc]

    @property
    def packed(self) -> PackedWeight:
        """The stored tensors as a `PackedWeight`: views in the stored layout, copies from the kernel layout."""
        return PackedWeight(self._stored(), self.out_features, self.in_features, self.settings)

    def _stored(self) -> dict[str, Tensor]:
        named = {name: tensor.detach() for name, tensor in zip(self.shape.names, self.tensors)}
        if self.layout == "stored":
            return named
        from sab_kernels import from_kernel_layout

        return from_kernel_layout(named, self.shape.geometry)

    @property
    def bits_per_weight(self) -> float:
        """From the bytes of every stored tensor of the layer, bias included."""
        return 8.0 * sum(self.stored_bytes.values()) / (self.out_features * self.in_features)

    @property
    def stored_bytes(self) -> dict[str, int]:
        """Bytes of the layer's tensors by name, bias included, as they are stored, whatever layout they are in now."""
        specs = tensor_specs(self.out_features, self.in_features, self.settings)
        sizes = {name: torch.Size(spec.shape).numel() * spec.dtype.itemsize for name, spec in specs.items()}
        if self.bias is not None:
            sizes["bias"] = self.bias.numel() * self.bias.element_size()
        return sizes

    # -- layouts ---------------------------------------------------------------------------------------------------

    def to_layout(self, layout: str) -> SABLinear:
        """Convert the packed tensors in place to ``"stored"`` or ``"kernel"``; exact both ways."""
        if layout == self.layout:
            return self
        if layout == "stored":
            tensors = self._stored()
        else:
            from sab_kernels import to_kernel_layout

            tensors = to_kernel_layout(self._stored(), self.shape.geometry)
        for name, tensor in tensors.items():
            self._store(name, tensor)
        self.layout = layout
        self._forget_group()
        return self

    def _forget_group(self) -> None:
        """Before the tensors become others."""
        if self.group is not None:
            self.group.forget()

    def prepare(self) -> SABLinear:
        """Convert to the layout of what computes on the layer's device, unless its tensors are only lent to it."""
        if self.weight.device.type != "meta" and not offloaded(self):
            kernel = backend_name(self.weight.device, self.backend) == "triton"
            self.to_layout("kernel" if kernel else "stored")
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SABLinear:
        """``.to``, ``.cuda`` and the like move stored tensors; what computes there decides their layout.

        Raises:
            ConfigError: ``.type`` and the like would make other numbers of the packed bits.
        """
        prepared = self.layout == "kernel"
        before = self.weight.device
        self._forget_group()
        self.to_layout("stored")
        super()._apply(_keeping_integers(fn), recurse)
        if prepared or self.weight.device != before != torch.device("meta"):  # from meta comes what is yet to be filled
            self.prepare()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.layout != "stored":
            destination.update({prefix + name: tensor for name, tensor in self._stored().items()})

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *arguments: Any) -> None:
        prepared = self.layout == "kernel"
        self._forget_group()
        self.to_layout("stored")
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        if prepared:
            self.prepare()

    # -- computation -----------------------------------------------------------------------------------------------

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """An ordinary linear with the weight Ŵ [out, in] in ``dtype`` (default float32)."""
        dtype = dtype or torch.float32
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        dense.weight = nn.Parameter(self.packed.dequantize().to(dtype), requires_grad=False)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().to(dtype), requires_grad=False)
        return dense

    def forward(self, inputs: Tensor) -> Tensor:
        """``x`` [..., in] → [..., out] in x's dtype.

        Raises:
            ConfigError: see `optimum_sab.ops.operator.binary_linear`.
        """
        if self.layout == "stored":
            if only_values(inputs):
                output = self._direct_output(inputs)
                if output is not None:
                    return output
            elif not torch.compiler.is_compiling() and self.weight.device.type != "cpu":
                self.prepare()  # made or filled on the device rather than moved to it
        if self.group is not None:
            output = self.group.output_of(self, inputs)
            if output is not None:
                return output
        return binary_linear(inputs, self.tensors, self.kind, self.bias, self.layout, self.backend)

    def _direct_output(self, inputs: Tensor) -> Tensor | None:
        """Past the dispatcher; None where the operator has to be asked."""
        if self.group is not None:
            output = self.group.direct_output_of(self, inputs)
            if output is not None:
                return output
        return self.direct(inputs, self._parameters, self.backend)

    def extra_repr(self) -> str:
        s = self.settings
        code = "" if s.code == NO_CODE else f", code={s.code}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"planes={s.base_planes}+{s.residual_planes}, block_size={s.block_size}, row_scale={s.row_scale}{code}"
        )


def _keeping_integers(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def apply(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        if result.dtype != tensor.dtype and not tensor.is_floating_point():
            raise ConfigError(
                f"a packed layer's {tensor.dtype} tensors hold bits and cannot become {result.dtype}; .to(dtype) casts "
                "everything else of the model."
            )
        return result

    return apply


def offloaded(module: nn.Module) -> bool:
    """Whether an accelerate hook brings the module's tensors for every call and takes them away again."""
    hook = getattr(module, "_hf_hook", None)
    return any(getattr(h, "offload", False) for h in (hook, *getattr(hook, "hooks", ())) if h is not None)
