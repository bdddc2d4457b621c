"""What is trained in one module: the scales of its packed linears, and its one-dimensional parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from optimum_sab.calibration.refine.scales import TrainableScales, power_of_two
from optimum_sab.format.packed_weight import PackedWeight
from optimum_sab.nn.selection import shared_parameters


class TrainableVector:
    """A norm weight or a bias as a free fp32 tensor in a unit that makes it about 1.

    Args:
        value: the start, one-dimensional; `built` has its dtype.
        device: where to train.
    """

    def __init__(self, value: Tensor, device: torch.device) -> None:
        start = value.detach().to(device, torch.float32)
        self.dtype = value.dtype
        self._unit = power_of_two(start.square().mean().sqrt())
        self.free = (start / self._unit).requires_grad_()

    def built(self) -> Tensor:
        """The vector in the model's dtype; gradients pass through the rounding."""
        return (self.free * self._unit).to(self.dtype)


class ModuleParameters:
    """The trainable tensors of a module with frozen signs, and the module's parameters built from them.

    Args:
        packed: packed weight of each linear, by its name inside the module.
        dtype: of the linears' weights when they compute.
        vectors: one-dimensional parameters by name inside the module (`vectors_of`).
        device: where to train.
    """

    def __init__(
        self,
        packed: Mapping[str, PackedWeight],
        dtype: torch.dtype,
        vectors: Mapping[str, Tensor],
        device: torch.device,
    ) -> None:
        self._dtype = dtype
        self.scales = {name: TrainableScales(weight, device) for name, weight in packed.items()}
        self.vectors = {name: TrainableVector(value, device) for name, value in vectors.items()}

    @property
    def tensors(self) -> list[Tensor]:
        """Everything an optimizer is to change, always in the same order."""
        scales = [t for s in self.scales.values() for t in s.tensors]
        return scales + [v.free for v in self.vectors.values()]

    def build(self) -> dict[str, Tensor]:
        """Parameters by name inside the module, as they would be after storing; gradients reach `tensors`."""
        weights = {f"{name}.weight": s.weight().to(self._dtype) for name, s in self.scales.items()}
        return {**weights, **{name: v.built() for name, v in self.vectors.items()}}

    def packed(self) -> dict[str, PackedWeight]:
        """The linears as they will be stored, by name inside the module."""
        return {name: s.packed() for name, s in self.scales.items()}

    def stored(self) -> tuple[dict[str, PackedWeight], dict[str, Tensor]]:
        """Linears and one-dimensional parameters as they will be stored, by name inside the module."""
        return self.packed(), self.built_vectors()

    def built_vectors(self) -> dict[str, Tensor]:
        """The one-dimensional parameters as they will be stored, by name inside the module."""
        return {name: v.built().detach() for name, v in self.vectors.items()}


def vectors_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """The one-dimensional floating parameters of a module by name: norm weights and biases.

    One that stands in several places is left out, since it would no longer be one.
    """
    shared = shared_parameters(module)
    return {
        name: p
        for name, p in module.named_parameters()
        if p.ndim == 1 and p.is_floating_point() and id(p) not in shared
    }


@torch.no_grad()
def write_vectors(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy values into parameters of the module by name; their ``requires_grad`` stays as it is."""
    for name, value in values.items():
        module.get_parameter(name).data.copy_(value)


@torch.no_grad()
def copied(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The values as they are now."""
    return [t.detach().clone() for t in tensors]


@torch.no_grad()
def restore(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Put `copied` values back."""
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
