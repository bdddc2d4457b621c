"""Which linears of a mixture of experts decide where a token goes: by what they are, not by the model's family."""

from __future__ import annotations

from torch import Tensor, nn

from optimum_sab.nn.experts import SABExperts
from optimum_sab.nn.linear import SABLinear

_NAMES = ("router", "gate")  # for experts that do not show how many they are


def find_routers(model: nn.Module) -> set[str]:
    """Names of the linears that choose experts for a token, or say how much of one comes back.

    Beside experts, a linear with an output for each of them (or for one more, which does nothing) is a router, and one
    with a single output weighs a shared expert. A module that ends in such a linear is a router with all its linears.
    Projections to and from the width of the experts are neither.

    Args:
        model: its weights may be on meta.
    """
    found: set[str] = set()
    for name, module in model.named_modules():
        children = dict(module.named_children())
        counts = _expert_counts(children)
        if counts is None:
            continue
        start = f"{name}." if name else ""
        for child, each in children.items():
            if isinstance(each, (nn.Linear, SABLinear)):
                if each.out_features == 1 or _chooses(each, counts) or child.endswith(_NAMES):
                    found.add(start + child)
            elif "expert" not in child:
                inner = [(k, m) for k, m in each.named_modules() if isinstance(m, (nn.Linear, SABLinear))]
                if inner and (_chooses(inner[-1][1], counts) or child.endswith(_NAMES)):
                    found |= {f"{start}{child}.{k}" for k, _ in inner}
    return found


def _chooses(linear: nn.Linear | SABLinear, counts: set[int]) -> bool:
    return linear.out_features in counts or linear.out_features - 1 in counts


def _expert_counts(children: dict[str, nn.Module]) -> set[int] | None:
    """How many experts stand among the children, by each tensor that shows it; None where there are no experts."""
    if "experts" in children:
        experts = children["experts"]
        counts = {len(experts)} if isinstance(experts, (nn.ModuleList, SABExperts)) else set()
        return counts | {p.shape[0] for p in experts.parameters() if _stacked(p)}
    stacks = [{p.shape[0] for p in each.parameters(recurse=False) if _stacked(p)} for each in children.values()]
    counts = {count for count in set().union(*stacks) if sum(count in each for each in stacks) > 1}
    return counts or None


def _stacked(parameter: Tensor) -> bool:
    """Whether it holds a matrix for each expert; a convolution's kernel has an input of width one."""
    return parameter.dim() == 3 and min(parameter.shape[1:]) > 1
