"""A model's fused experts become linears, and linears become fused experts again."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from optimum_sab.errors import warn
from optimum_sab.nn.decoder import find_decoder_blocks
from optimum_sab.nn.experts import SABExperts
from optimum_sab.nn.fused_experts import FusedLayout, fused_layout
from optimum_sab.nn.modules import set_module
from optimum_sab.nn.selection import shared_parameters
from optimum_sab.nn.streamed import weights_around

_ROWS = 4
_DIFFERENCE = {torch.bfloat16: 0.03, torch.float16: 0.005}  # of outputs computed in another order


def fused_experts(model: nn.Module) -> dict[str, FusedLayout]:
    """The modules inside of the decoder blocks that fuse experts, by dotted name.

    Those whose weights stand in another place too are left out, as shared linears are: what they are given in one says
    nothing of the other.

    Args:
        model: its weights may be on meta.
    """
    lists, shared = find_decoder_blocks(model).lists, shared_parameters(model)
    found = {
        name: fused_layout(module)
        for name, module in model.named_modules()
        if lists.holds(name) and not any(id(each) in shared for each in module.parameters(recurse=False))
    }
    return {name: layout for name, layout in found.items() if layout is not None}


def unfuse_experts(model: nn.Module, names: Collection[str] | None = None) -> list[str]:
    """Put `SABExperts` of dense linears in the place of fused experts. Weights are not copied.

    A module that computes something else than its parts say stays as it is, with a warning.

    Args:
        model: its weights may be on meta.
        names: which, by dotted name; None for all.

    Returns:
        The names of those that were replaced.
    """
    replaced = []
    strange: dict[type[nn.Module], str] = {}
    tried: set[type[nn.Module]] = set()
    for name, layout in fused_experts(model).items():
        own = model.get_submodule(name)
        if (names is not None and name not in names) or type(own) in strange:
            continue
        if type(own) not in tried:
            with weights_around(model, name):
                same = _computes_the_same(own, layout)
            if not same:
                strange[type(own)] = name
                continue
        tried.add(type(own))
        set_module(model, name, SABExperts.unfused(own, layout))
        replaced.append(name)
    for kind, name in strange.items():
        warn(f"{name} ({kind.__name__}) computes more with its experts than two matrices; they stay dense.")
    return replaced


def fuse_experts(model: nn.Module) -> None:
    """Put the modules back that `unfuse_experts` replaced, with the weights that their experts have by now."""
    for name, module in list(model.named_modules()):
        if isinstance(module, SABExperts):
            set_module(model, name, module.dequantize())


@contextmanager
def experts_unfused(model: nn.Module, names: Collection[str] | None = None) -> Iterator[None]:
    """Inside, the model has `SABExperts`; outside it is what it was, with the same parameters.

    Args:
        model: on meta, or with weights.
        names: which are replaced; None for all.
    """
    before: dict[str, tuple[nn.Module, dict[str, Tensor | None]]] = {}
    for name in fused_experts(model):
        own = model.get_submodule(name)
        before[name] = (own, dict(own._parameters))
    unfuse_experts(model, names)
    try:
        yield
    finally:
        for name, (own, parameters) in before.items():
            own._parameters.update(parameters)  # type: ignore[arg-type]
            set_module(model, name, own)


@torch.no_grad()
def _computes_the_same(own: nn.Module, layout: FusedLayout) -> bool:
    """Whether the module's own forward gives what its linears give together, on a few random tokens."""
    weight = own.get_parameter(layout.matrices[0])
    if weight.is_meta:
        return True  # seen when the weights are there
    count, width = weight.shape[0], layout.matrix(own, layout.matrices[0], 0).shape[1]
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(_ROWS * (1 if len(layout.arguments) > 1 else count), width, generator=generator)
    given: list[Tensor] = [rows.to(weight.device, weight.dtype)]
    if len(layout.arguments) > 1:
        k = min(2, count)
        chosen = torch.stack([torch.randperm(count, generator=generator)[:k] for _ in range(_ROWS)])
        given += [chosen.to(weight.device), torch.rand(_ROWS, k, generator=generator).to(weight.device, weight.dtype)]
    wanted = own(*given).float()
    parameters = dict(own._parameters)
    found = SABExperts.unfused(own, layout)(*given).float()
    own._parameters.update(parameters)
    difference = (found - wanted).norm() / wanted.norm().clamp(min=torch.finfo(torch.float32).tiny)
    return bool(difference <= _DIFFERENCE.get(weight.dtype, 1e-3))
