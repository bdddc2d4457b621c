"""Layers that share their input, such as q, k and v, computed in one launch while their modules stay what they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from optimum_sab.nn.linear import SABLinear
from optimum_sab.ops.operator import stacked_linear
from optimum_sab.ops.shape import LayerShape

MAX_MEMBERS = 4  # as many layers as one launch writes outputs for
ROW_TILE = 32
SHARED = ("residual_index", "col_scale")  # tensors that have no rows, and must be equal


class InputGroup:
    """Sibling layers that the solver fitted as one matrix, with the same column scales and salient columns.

    When the first member is called, all are computed; the others, called with the same tensor, take their part. The
    members' packed tensors are then views of stacked ones. A member that is called with another tensor computes alone,
    and so do all where the kernel layout is not in use.

    The same tensor is the same object in the same version. `torch.compile` cannot see versions, so while it traces the
    group is used only after it has been seen to work in an ordinary call.

    Args:
        members: in the order in which the model calls them, two to four.
    """

    def __init__(self, members: Sequence[SABLinear]) -> None:
        self.members = tuple(members)
        self.sizes = tuple(m.out_features for m in members)
        self.proven = False
        self._pending: tuple[Tensor, int, list[Tensor]] | None = None
        self._hits = 0
        self._pointers: tuple[int, ...] = ()
        self._stack: list[Tensor] = []
        self._bias: Tensor | None = None
        first = members[0]
        self.shape = LayerShape.of(sum(self.sizes), first.in_features, first.settings)

    def output_of(self, member: SABLinear, inputs: Tensor) -> Tensor | None:
        """The member's output for these inputs, or None: then it computes alone."""
        tracing = torch.compiler.is_compiling()
        if tracing and not self.proven:
            return None
        index = self._index(member)
        pending = self._pending
        if index == 0:
            if not tracing and not self._ready():
                self._pending = None
                return None
            outputs = stacked_linear(inputs, self._stack, self.shape, self.sizes, self._bias, member.backend)
            self._pending = (inputs, 0 if tracing else _version(inputs), outputs)
            self._hits = 0
            return outputs[0]
        if pending is None or pending[0] is not inputs:
            return None
        if not tracing:
            if pending[1] != _version(inputs):  # changed in place between the calls: these layers do not share an input
                self.dissolve()
                return None
            self._hits += 1
        if index == len(self.members) - 1:
            self._pending = None
            if not tracing and self._hits == index:
                self.proven = True
        return pending[2][index]

    def dissolve(self) -> None:
        """Members compute alone from now on."""
        self._pending = None
        for member in self.members:
            member.group = None

    def _index(self, member: SABLinear) -> int:
        for index, each in enumerate(self.members):
            if each is member:
                return index
        raise ValueError("the layer is no member of its group")

    def _ready(self) -> bool:
        """Whether the stacked tensors are those of the members; stacks them anew after the members have been moved."""
        pointers = tuple(m.weight.data_ptr() for m in self.members)
        if pointers == self._pointers:
            return True
        if any(m.layout != "kernel" for m in self.members) or len({m.weight.device for m in self.members}) > 1:
            return False
        if len({None if m.bias is None else m.bias.dtype for m in self.members}) > 1:
            return False
        self._restack()
        return True

    @torch.no_grad()
    def _restack(self) -> None:
        from torch._dynamo import mark_static_address  # takes a second to import, and only kernels on a GPU need it

        self._stack = []
        for name in self.shape.names:
            parts = [m._parameters[name] for m in self.members]
            if name in SHARED:
                self._stack.append(parts[0])  # type: ignore[arg-type]
                continue
            whole = torch.cat(parts)  # type: ignore[arg-type]
            mark_static_address(whole)  # compiled CUDA graphs would copy it at every call otherwise
            self._stack.append(whole)
            for member, view in zip(self.members, whole.split([len(p) for p in parts])):  # type: ignore[arg-type]
                member._parameters[name] = nn.Parameter(view, requires_grad=False)
        biases = [m.bias for m in self.members]
        self._bias = None if biases[0] is None else torch.cat(biases)  # type: ignore[arg-type]
        self._pointers = tuple(m.weight.data_ptr() for m in self.members)

    def __getstate__(self) -> dict[str, Any]:
        """Copies stack their own tensors: they are views here, and would be copied twice."""
        return {**self.__dict__, "_pending": None, "_pointers": (), "_stack": [], "_bias": None}


def group_linears(model: nn.Module) -> list[InputGroup]:
    """Group the siblings of every module that have equal settings, column scales and salient columns.

    The solver gives those to linears that share an input and to no others. Earlier groups are dissolved.
    """
    for module in model.modules():
        if isinstance(module, SABLinear):
            module.group = None
    groups = []
    for parent in model.modules():
        siblings = [child for child in parent.children() if isinstance(child, SABLinear)]
        while siblings:
            first = siblings.pop(0)
            members = [first, *(s for s in siblings if _alike(first, s))][:MAX_MEMBERS]
            siblings = [s for s in siblings if not any(s is m for m in members)]
            if len(members) > 1 and all(m.out_features % ROW_TILE == 0 for m in members[:-1]):
                group = InputGroup(members)
                for member in members:
                    member.group = group
                groups.append(group)
    return groups


def _alike(one: SABLinear, other: SABLinear) -> bool:
    if one.shape[1:] != other.shape[1:] or one.backend != other.backend or one.layout != other.layout:
        return False
    if (one.bias is None) != (other.bias is None) or one.weight.device != other.weight.device:
        return False
    if one.weight.device.type == "meta":
        return False
    names = [name for name in SHARED if name in one.shape.names]
    return all(torch.equal(one._parameters[n], other._parameters[n]) for n in names)  # type: ignore[arg-type]


def _version(tensor: Tensor) -> int:
    """Counts changes in place. Tensors made in inference mode do not count; such a change is not noticed."""
    return 0 if tensor.is_inference() else tensor._version
