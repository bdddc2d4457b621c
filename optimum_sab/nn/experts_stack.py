"""Packed linears of all experts, stacked, so that one launch computes those that have tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optimum_sab.nn.layer_group import LayerGroup
from optimum_sab.nn.linear import SABLinear, offloaded
from optimum_sab.ops.experts import ExpertWeights, experts_linear
from optimum_sab.ops.shape import LayerShape


@dataclass(frozen=True)
class _Alike:
    """Experts whose linears have the same settings.

    Attributes:
        weights: of these; the linears' own tensors are views of them.
        place: [all experts + 1], where each stands among these, -1 where it does not; None where these are all.
    """

    weights: ExpertWeights
    place: Tensor | None


@dataclass(frozen=True)
class ExpertsStack:
    """The linears of one name of all experts of a block.

    Attributes:
        count: of the experts.
        parts: those with the same settings together: rarely used experts may have fewer bits.
    """

    count: int
    parts: tuple[_Alike, ...]

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
        parts = []
        for indices in groups.values():
            weights = _stacked([packed[index] for index in indices], backend)
            parts.append(_Alike(weights, _places(indices, len(packed), weights.tensors[0].device)))
        for each in packed:
            each.group = owner
        return cls(len(packed), tuple(parts))

    def tensors(self) -> Iterator[Tensor]:
        """All that it holds."""
        for part in self.parts:
            more = (part.weights.bias, part.place)
            yield from (*part.weights.tensors, *(each for each in more if each is not None))

    def product(self, inputs: Tensor, pairs: Tensor, repeats: int) -> Tensor:
        """See `SABExperts.product`."""
        found = None
        for part in self.parts:
            chosen = pairs if part.place is None else part.place[pairs.clamp(-1, self.count)]
            output = experts_linear(inputs, chosen, part.weights, repeats)
            found = output if found is None else found + output  # a pair is in one part, and zero in the others
        assert found is not None
        return found


class ExpertStacks:
    """A module's stacks by the name of their linears; forgotten whenever one of those becomes another."""

    def __init__(self) -> None:
        self._of: dict[str, ExpertsStack] | None = None
        self._backend: str | None = None

    def of(self, name: str, members: Callable[[], Mapping[str, Sequence[nn.Module]]]) -> ExpertsStack | None:
        """The stack of linears of one name; None where they are not all packed and where they can be stacked.

        Args:
            name: of the linears.
            members: gives those of all experts by name; asked where the stacks have to be made.
        """
        if self._of is None:
            self.build(members(), self._backend)
        return None if self._of is None else self._of.get(name)

    def build(self, members: Mapping[str, Sequence[nn.Module]], backend: str | None) -> None:
        """Stack what can be."""
        self._backend = backend
        found = {name: ExpertsStack.of(each, self, backend) for name, each in members.items()}
        self._of = {name: stack for name, stack in found.items() if stack is not None}

    def tensors(self) -> Iterator[Tensor]:
        """Of the stacks that are made; the linears' own are views of them."""
        for stack in (self._of or {}).values():
            yield from stack.tensors()

    def forget(self) -> None:
        """A linear, or its tensors, are about to change."""
        self._of = None

    def output_of(self, member: nn.Module, inputs: Tensor) -> None:
        """A linear that is called by itself computes alone."""

    def direct_output_of(self, member: nn.Module, inputs: Tensor) -> None:
        """A linear that is called by itself computes alone."""

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertStacks:
        """Copies stack their own tensors."""
        copied = memo[id(self)] = ExpertStacks()
        copied._backend = self._backend
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {"_of": None, "_backend": self._backend}


def _is_plain(member: SABLinear) -> bool:
    """Whether it computes ``x Ŵᵀ + b`` with tensors that stay where they are, and nobody listens or trains."""
    patched = "forward" in member.__dict__ and not hasattr(member, "_hf_hook")
    trained = member.bias is not None and member.bias.requires_grad
    return not (patched or trained or offloaded(member) or member.weight.device.type == "meta")


def _stacked(members: Sequence[SABLinear], backend: str | None) -> ExpertWeights:
    """Their tensors and biases in one, of which theirs become views."""
    tensors = []
    for name in members[0].shape.names:
        whole = torch.stack([getattr(each, name).detach() for each in members])
        if whole.is_cuda:
            from torch._dynamo import mark_static_address  # takes a second to import

            mark_static_address(whole)  # compiled CUDA graphs would copy it at every call otherwise
        tensors.append(whole)
        for member, view in zip(members, whole):
            member.register_parameter(name, nn.Parameter(view, requires_grad=False))
    bias = None
    if members[0].bias is not None:
        bias = torch.stack([each.get_parameter("bias").detach() for each in members])
        for member, own in zip(members, bias):
            member.bias = nn.Parameter(own, requires_grad=False)
    return ExpertWeights(tensors, members[0].shape, bias, members[0].layout, backend)


def _places(indices: Sequence[int], count: int, device: torch.device) -> Tensor | None:
    if len(indices) == count:
        return None
    place = torch.full((count + 1,), -1, dtype=torch.long, device=device)  # what is no expert finds the last
    place[list(indices)] = torch.arange(len(indices), device=device)
    return place
