"""Packed linears of all experts, stacked, so that one launch computes those that have tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from optimum_sab.nn.layer_group import LayerGroup
from optimum_sab.nn.linear import SABLinear, offloaded
from optimum_sab.ops.experts import experts_linear
from optimum_sab.ops.shape import LayerShape


@dataclass(frozen=True)
class _Alike:
    """Experts whose linears have the same settings.

    Attributes:
        shape: of each.
        tensors: [experts, ...], in the order of the shape's names; the linears' own are views of them.
        bias: [experts, out], or None.
        place: [all experts + 1], where each stands among these, -1 where it does not; None where these are all.
    """

    shape: LayerShape
    tensors: list[Tensor]
    bias: Tensor | None
    place: Tensor | None


@dataclass(frozen=True)
class ExpertsStack:
    """The linears of one name of all experts of a block.

    Attributes:
        count: of the experts.
        parts: those with the same settings together: rarely used experts may have fewer bits.
        layout: of the tensors.
        backend: what computes; None leaves it to the device.
    """

    count: int
    parts: tuple[_Alike, ...]
    layout: str
    backend: str | None

    @classmethod
    @torch.no_grad()
    def of(cls, members: Sequence[nn.Module], owner: LayerGroup, backend: str | None) -> ExpertsStack | None:
        """Stack linears; None where one is not packed, wrapped, offloaded, or elsewhere.

        Args:
            members: of the experts in order.
            owner: is told when their tensors change.
            backend: what computes.
        """
        packed = [each for each in members if isinstance(each, SABLinear) and _is_plain(each)]
        if len(packed) != len(members) or len({(each.layout, each.weight.device) for each in packed}) != 1:
            return None
        groups: dict[LayerShape, list[int]] = {}
        for index, each in enumerate(packed):
            groups.setdefault(each.shape, []).append(index)
        parts = [_stacked([packed[i] for i in indices], indices, len(packed)) for indices in groups.values()]
        for each in packed:
            each.group = owner
        return cls(len(packed), tuple(parts), packed[0].layout, backend)

    def product(self, inputs: Tensor, pairs: Tensor, repeats: int) -> Tensor:
        """See `SABExperts.product`."""
        found = None
        for part in self.parts:
            chosen = pairs if part.place is None else part.place[pairs.clamp(-1, self.count)]
            output = experts_linear(
                inputs, chosen, part.tensors, part.shape, part.bias, repeats, self.layout, self.backend
            )
            found = output if found is None else found + output  # a pair is in one part, and zero in the others
        assert found is not None
        return found


def _is_plain(member: SABLinear) -> bool:
    """Whether it computes ``x Ŵᵀ + b`` with tensors that stay where they are, and nobody listens or trains."""
    patched = "forward" in member.__dict__ and not hasattr(member, "_hf_hook")
    trained = member.bias is not None and member.bias.requires_grad
    return not (patched or trained or offloaded(member) or member.weight.device.type == "meta")


def _stacked(members: Sequence[SABLinear], indices: Sequence[int], count: int) -> _Alike:
    from torch._dynamo import mark_static_address  # takes a second to import

    tensors = []
    for name in members[0].shape.names:
        whole = torch.stack([getattr(each, name).detach() for each in members])
        if whole.is_cuda:
            mark_static_address(whole)  # compiled CUDA graphs would copy it at every call otherwise
        tensors.append(whole)
        for member, view in zip(members, whole):
            member.register_parameter(name, nn.Parameter(view, requires_grad=False))
    bias = None
    if members[0].bias is not None:
        bias = torch.stack([each.get_parameter("bias").detach() for each in members])
        for member, own in zip(members, bias):
            member.bias = nn.Parameter(own, requires_grad=False)
    place = None
    if len(indices) < count:
        place = torch.full((count + 1,), -1, dtype=torch.long, device=tensors[0].device)  # -1 is its last
        place[list(indices)] = torch.arange(len(indices), device=place.device)
    return _Alike(members[0].shape, tensors, bias, place)
