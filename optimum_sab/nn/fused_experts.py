"""Experts that a model keeps as three-dimensional parameters: how it does that is asked of the module itself.

Transformers 5 fuses the experts of a block into one module with a parameter for each of their two matrices,
``gate_up_proj`` (or ``up_proj``, without a gate) and ``down_proj``. Which dimension is the input, whether there are
biases, what is between the two and what follows are attributes and methods that its experts interface gives every such
module, so there is no list of architectures here.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor, nn

FIRST = ("gate_up_proj", "up_proj")
SECOND = "down_proj"
_INTERFACE = ("has_gate", "has_bias", "is_transposed")  # what Transformers' experts interface adds to a module


@dataclass(frozen=True)
class FusedLayout:
    """Where the matrices of a fused module are.

    Attributes:
        matrices: names of its three-dimensional parameters, in the order in which they are applied.
        transposed: [experts, in, out] instead of [experts, out, in].
        biased: beside each is a parameter ``<name>_bias`` [experts, out].
        arguments: names of its forward's arguments: hidden states [tokens, in]; then, unless the caller has brought
            every expert its tokens, the experts chosen [tokens, k] and their weights [tokens, k].
    """

    matrices: tuple[str, str]
    transposed: bool
    biased: bool
    arguments: tuple[str, ...]

    def matrix(self, module: nn.Module, name: str, expert: int) -> Tensor:
        """One expert's matrix, [out, in]: a view."""
        own = getattr(module, name).detach()[expert]
        return own.T if self.transposed else own

    def bias(self, module: nn.Module, name: str, expert: int) -> Tensor | None:
        """One expert's bias, [out]: a view; None without."""
        return getattr(module, f"{name}_bias").detach()[expert] if self.biased else None

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of all parameters that hold experts."""
        return (*self.matrices, *(f"{name}_bias" for name in self.matrices if self.biased))


def fused_layout(module: nn.Module) -> FusedLayout | None:
    """How a module keeps its experts; None where it is no module of fused experts, or does more than is known here.

    Args:
        module: its parameters may be on meta.
    """
    own = dict(module.named_parameters(recurse=False))
    first = next((name for name in FIRST if name in own), None)
    if first is None or SECOND not in own or own[first].dim() != 3 or own[SECOND].dim() != 3:
        return None
    arguments = tuple(inspect.signature(module.forward).parameters)
    of_interface = all(hasattr(module, name) for name in _INTERFACE)
    transposed, biased = getattr(module, "is_transposed", True), bool(getattr(module, "has_bias", False))
    if len(arguments) != (3 if of_interface else 1):
        return None
    if not of_interface and _fits(own, first, True) == _fits(own, first, False):
        return None  # nothing tells which dimension is the input
    if not of_interface:
        transposed = _fits(own, first, True)
    layout = FusedLayout((first, SECOND), bool(transposed), biased, arguments)
    counts = {own[name].shape[0] for name in layout.parameters if name in own}
    known = set(layout.parameters) == set(own) and len(counts) == 1 and not list(module.buffers(recurse=False))
    return (
        layout if known and _fits(own, first, layout.transposed) and hasattr(module, "act_fn") | of_interface else None
    )


def _fits(own: dict[str, nn.Parameter], first: str, transposed: bool) -> bool:
    """Whether the second matrix has as many inputs as the first leaves outputs, and leads back to its width."""
    (a, b), (c, d) = own[first].shape[1:], own[SECOND].shape[1:]
    width, inner, inputs, out = (a, b, c, d) if transposed else (b, a, d, c)
    return width == out and inner == (2 if first == FIRST[0] else 1) * inputs


@torch.no_grad()
def fuse(module: nn.Module, layout: FusedLayout, matrices: dict[str, list[Tensor]]) -> nn.Module:
    """Give a module its parameters back.

    Args:
        module: that `fused_layout` was asked of.
        layout: its answer.
        matrices: for each of ``layout.parameters``, every expert's [out, in] or [out].
    """
    for name, experts in matrices.items():
        turned = [each.T for each in experts] if layout.transposed and name in layout.matrices else experts
        module.register_parameter(name, nn.Parameter(torch.stack(turned), requires_grad=False))
    return module
