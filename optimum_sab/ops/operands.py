"""What all operators on packed weights have in common: a weight as their schemas hold it, checks, and autocast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from optimum_sab.errors import ConfigError
from optimum_sab.format.packed_weight import PackedWeight
from optimum_sab.ops.reference import check_input
from optimum_sab.ops.shape import LayerShape

WEIGHT = "Tensor[] tensors, str layout, str? backend, str shape"  # `LayerShape.text`
library = torch.library.Library("optimum_sab", "DEF")


class Weight(NamedTuple):
    """What operators are given of a weight as `WEIGHT` says."""

    tensors: Sequence[Tensor]
    layout: str
    backend: str | None
    shape: LayerShape

    @classmethod
    def of(cls, tensors: Sequence[Tensor], layout: str, backend: str | None, shape: str) -> Weight:
        return cls(tensors, layout, backend, LayerShape.read(shape))

    def member(self, index: int) -> Weight:
        """One layer of a stack."""
        return self._replace(tensors=[tensor[index] for tensor in self.tensors])

    def for_kernels(self) -> dict[str, Tensor]:
        named = dict(zip(self.shape.names, self.tensors))
        if self.layout == "kernel":
            return named
        from sab_kernels import to_kernel_layout  # an offloaded layer, whose tensors come and go: at every call

        return to_kernel_layout(named, self.shape.geometry)

    def stored(self) -> Sequence[Tensor]:
        if self.layout == "stored":
            return self.tensors
        from sab_kernels import from_kernel_layout

        named = from_kernel_layout(dict(zip(self.shape.names, self.tensors)), self.shape.geometry)
        return [named[name] for name in self.shape.names]

    def packed(self) -> PackedWeight:
        named = dict(zip(self.shape.names, self.stored()))
        return PackedWeight(named, self.shape.out_features, self.shape.in_features, self.shape.settings)

    def check(self, x: Tensor) -> None:
        """Refuse an input that does not fit."""
        check_input(x, self.shape.in_features)
        device = self.tensors[0].device
        if device != x.device:
            if device.type == "meta":
                raise ConfigError(
                    "the layer's tensors are on meta: it was never loaded, or is offloaded without a hook."
                )
            raise ConfigError(f"the input is on {x.device}, the layer on {device}; move one of them.")


def refuse_forward_mode(x: Tensor) -> None:
    """PyTorch drops forward-mode derivatives of operators that have none, without a word."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if forward_ad.unpack_dual(x).tangent is not None:
        raise NotImplementedError(
            "packed layers have no forward-mode derivative (jvp); use reverse mode (backward, vjp)."
        )


def kernel_dtype(x: Tensor) -> torch.dtype:
    """In which kernels take x."""
    return x.dtype if x.dtype in (torch.bfloat16, torch.float16) else torch.float32


def no_gradients(arguments: Sequence[Any]) -> list[Any]:
    """None for every argument, and a list of them for a list of tensors."""
    return [[None] * len(a) if _is_tensor_list(a) else None for a in arguments]


def _is_tensor_list(argument: Any) -> bool:
    return isinstance(argument, (list, tuple)) and all(isinstance(a, Tensor) for a in argument)


_AUTOCAST_KEYS = {
    "cpu": torch._C.DispatchKey.AutocastCPU,
    "cuda": torch._C.DispatchKey.AutocastCUDA,
    "xpu": torch._C.DispatchKey.AutocastXPU,
}


def cast_under_autocast(name: str) -> None:
    """Let an operator of `library` do as `torch.nn.functional.linear` under autocast: x is cast to autocast's dtype."""
    for device_type, key in _AUTOCAST_KEYS.items():
        library.impl(name, _autocast(name, device_type), key.name)


def _autocast(name: str, device_type: str) -> Any:
    operator = getattr(torch.ops.optimum_sab, name)
    keys = torch._C.DispatchKeySet(_AUTOCAST_KEYS[device_type])

    def cast(x: Tensor, *arguments: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            eligible = x.is_floating_point() and x.dtype != torch.float64
            return operator(x.to(torch.get_autocast_dtype(device_type)) if eligible else x, *arguments)

    return cast
