"""Layers that share their input, such as q, k and v, computed in one launch while their modules stay what they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from optimum_sab.nn.experts import SABExpert
from optimum_sab.nn.linear import SABLinear
from optimum_sab.nn.shared import SABShare
from optimum_sab.ops.cpu.direct import direct_linears
from optimum_sab.ops.operator import stacked_linear
from optimum_sab.ops.shape import LayerShape

MAX_MEMBERS = 4  # as many layers as one launch writes outputs for
ROW_TILE = 32
PATIENCE = 3  # launches whose other outputs nobody took, as where siblings merely look alike
SHARED = ("residual_index", "col_scale")  # tensors that have no rows, and must be equal


class _Pending(NamedTuple):
    """Outputs of members that have not been called yet, how many there are, and for what."""

    inputs: Tensor
    version: int
    mode: tuple[Any, ...]
    outputs: tuple[Tensor | None, ...]
    left: int

    def without(self, index: int) -> _Pending | None:
        """What is left when a member has taken its output; nothing when it was the last one."""
        if self.left == 1:
            return None
        rest = (*self.outputs[:index], None, *self.outputs[index + 1 :])
        return _Pending(self.inputs, self.version, self.mode, rest, self.left - 1)


class InputGroup:
    """Sibling layers that the solver fitted as one matrix, with the same column scales and salient columns.

    When the first member is called, all are computed; the others, called with the same tensor, take their part, once.
    The members' packed tensors are then views of stacked ones. A member that is called with another tensor, or in
    another grad or autocast mode, computes alone, and so do all where the kernel layout is not in use or a bias is
    trained.

    The same tensor is the same object in the same version. `torch.compile` cannot see versions, so while it traces the
    group is used only after it has been seen to work in an ordinary call.

    Args:
        members: in the order in which the model calls them, two to four.
    """

    def __init__(self, members: Sequence[SABLinear]) -> None:
        self.members = tuple(members)
        self.sizes = tuple(m.out_features for m in members)
        self.proven = False
        self._pending: _Pending | None = None
        self._wasted_launches = 0
        self._pointers: tuple[int, ...] = ()
        self._stack: list[Tensor] = []
        first = members[0]
        self.shape = LayerShape.of(sum(self.sizes), first.in_features, first.settings)
        self._kind = self.shape.text

    def output_of(self, member: nn.Module, inputs: Tensor) -> Tensor | None:
        """The member's output for these inputs, or None: then it computes alone."""
        tracing = torch.compiler.is_compiling()
        if tracing and not self.proven:
            return None
        index = self._index(member)
        if index == 0:
            if not tracing and self._wasted():
                return None
            self._pending = None
            if not tracing and not self._ready():
                return None
            biases = [m.bias for m in self.members if m.bias is not None]
            if torch.is_grad_enabled() and any(b.requires_grad for b in biases):
                return None
            outputs = stacked_linear(inputs, self._stack, self._kind, self.sizes, biases, self.members[0].backend)
            self._pending = self._left(inputs, _mode(inputs), outputs, tracing)
            return outputs[0]
        return self._take(index, inputs, _mode(inputs), tracing)

    def direct_output_of(self, member: nn.Module, inputs: Tensor) -> Tensor | None:
        """The same on the CPU, from the members' own tensors; `only_values` holds for the inputs."""
        index, mode = self._index(member), (torch.is_grad_enabled(), None)  # autocast is off
        if index:
            return self._take(index, inputs, mode)
        if self._wasted():
            return None
        self._pending = None
        members = self.members
        outputs = direct_linears(
            inputs, [m.direct for m in members], [m._parameters for m in members], members[0].backend
        )
        if outputs is None:
            return None
        self._pending = self._left(inputs, mode, outputs)
        return outputs[0]

    def _left(self, inputs: Tensor, mode: tuple[Any, ...], outputs: list[Tensor], tracing: bool = False) -> _Pending:
        """What the first member's call leaves for the others."""
        return _Pending(inputs, 0 if tracing else _version(inputs), mode, (None, *outputs[1:]), len(outputs) - 1)

    def _take(self, index: int, inputs: Tensor, mode: tuple[Any, ...], tracing: bool = False) -> Tensor | None:
        """What the first member's call left for another one."""
        pending = self._pending
        if pending is None or pending.inputs is not inputs or pending.mode != mode:
            return None
        if not tracing and pending.version != _version(inputs):
            self.dissolve()  # changed in place between the calls: these layers do not share an input
            return None
        output = pending.outputs[index]
        if output is None:  # it was called before
            return None
        self._pending = pending.without(index)
        if self._pending is None and not tracing:
            self.proven = bool(self._stack)  # every member took its part
        return output

    def _wasted(self) -> bool:
        """Counts launches of which the others took nothing; after a few the group is given up."""
        untouched = self._pending is not None and self._pending.left == len(self.members) - 1
        self._wasted_launches = self._wasted_launches + 1 if untouched else 0
        if self._wasted_launches < PATIENCE:
            return False
        self.dissolve()
        return True

    def forget(self) -> None:
        """The members' tensors are about to change: stack them anew at the next ordinary call."""
        self.proven = False
        self._pending = None
        self._pointers = ()
        self._stack = []

    def dissolve(self) -> None:
        """Members compute alone from now on."""
        self._pending = None
        for member in self.members:
            member.group = None

    def _index(self, member: nn.Module) -> int:
        for index, each in enumerate(self.members):
            if each is member:
                return index
        raise ValueError("the layer is no member of its group")

    def _ready(self) -> bool:
        """Whether the stacked tensors are those of the members; stacks them anew after they were moved or loaded."""
        if tuple(m.weight.data_ptr() for m in self.members) == self._pointers:
            return True
        if any(m.layout != "kernel" for m in self.members):
            return False
        if not all(_alike(self.members[0], m) for m in self.members[1:]):
            self.dissolve()
            return False
        self._restack()
        return True

    @torch.no_grad()
    def _restack(self) -> None:
        from torch._dynamo import mark_static_address  # takes a second to import, and only kernels on a GPU need it

        self._stack = []
        for name, parts in zip(self.shape.names, zip(*(m.tensors for m in self.members))):
            if name in SHARED:
                self._stack.append(parts[0])
                continue
            whole = torch.cat(parts)
            mark_static_address(whole)  # compiled CUDA graphs would copy it at every call otherwise
            self._stack.append(whole)
            for member, view in zip(self.members, whole.split([len(p) for p in parts])):
                member.register_parameter(name, nn.Parameter(view, requires_grad=False))
        self._pointers = tuple(m.weight.data_ptr() for m in self.members)

    def __getstate__(self) -> dict[str, Any]:
        """Copies stack their own tensors: they are views here, and would be copied twice."""
        return {**self.__dict__, "proven": False, "_pending": None, "_pointers": (), "_stack": []}


def group_linears(model: nn.Module) -> list[InputGroup]:
    """Group the siblings of every module that have equal settings, column scales and salient columns.

    The solver gives those to linears that share an input and to no others. Earlier groups are dissolved.
    """
    for module in model.modules():
        if isinstance(module, SABLinear):
            module.group = None
    groups = []
    for parent in model.modules():
        if isinstance(parent, (SABExpert, SABShare)):
            continue  # linears that follow each other, or have inputs of their own
        siblings = [linear for child in parent.children() if (linear := _linear_of(child)) is not None]
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


def _linear_of(child: nn.Module) -> SABLinear | None:
    """The packed linear that a module is, or is a process's share of."""
    if isinstance(child, SABShare):
        return child.only
    return child if isinstance(child, SABLinear) else None


def _alike(one: SABLinear, other: SABLinear) -> bool:
    if one.shape[1:] != other.shape[1:] or one.backend != other.backend or one.layout != other.layout:
        return False
    if one.weight.device != other.weight.device or one.weight.device.type == "meta":
        return False
    if (None if one.bias is None else one.bias.dtype) != (None if other.bias is None else other.bias.dtype):
        return False
    named = zip(one.shape.names, one.tensors, other.tensors)
    return all(torch.equal(a, b) for name, a, b in named if name in SHARED)


def _mode(inputs: Tensor) -> tuple[Any, ...]:
    """What else an output depends on: whether gradients are recorded, and autocast's dtype."""
    kind = inputs.device.type
    return torch.is_grad_enabled(), torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _version(tensor: Tensor) -> int:
    """Counts changes in place. Tensors made in inference mode do not count; such a change is not noticed."""
    return 0 if tensor.is_inference() else tensor._version
