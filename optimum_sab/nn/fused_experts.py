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
_ROUTING = ("top_k_index", "top_k_weights")  # what modules outside of it are given, that have the same forward


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
    if all(hasattr(module, name) for name in _INTERFACE) and len(arguments) == 3:
        transposed, biased = bool(module.is_transposed), bool(module.has_bias)
    elif arguments[1:] in ((), _ROUTING) and _fits(own, first, True) != _fits(own, first, False):
        transposed, biased = _fits(own, first, True), False  # its shapes tell which dimension is the input
    else:
        return None
    layout = FusedLayout((first, SECOND), transposed, biased, arguments)
    known = set(layout.parameters) == set(own) and not list(module.buffers(recurse=False))
    alike = len({parameter.shape[0] for parameter in own.values()}) == 1
    computes = hasattr(module, "_apply_gate") or hasattr(module, "act_fn")
    return layout if known and alike and computes and _fits(own, first, transposed) else None


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
