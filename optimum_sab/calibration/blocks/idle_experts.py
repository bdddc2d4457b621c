"""Linears that no calibration token reached: experts may be idle, anything else is a fault."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import nn

from optimum_sab.errors import CalibrationError, warn
from optimum_sab.wording import counted

MISSED = 0.25  # of the weights that are binarized in a block: so many may be those of experts without a token


def allow_idle_experts(names: Sequence[str], linears: Mapping[str, nn.Linear], reached: Collection[str]) -> None:
    """Warn that linears are binarized without data, if they are those of a few experts.

    Args:
        names: the linears that no token reached.
        linears: all of the block that are binarized, by dotted name.
        reached: names of those that tokens reached.

    Raises:
        CalibrationError: one is no expert among others that were reached, or they are more than `MISSED` of the block.
    """
    missed, selected = (sum(linears[n].weight.numel() for n in some) for some in (names, linears))
    experts = {name: idle_expert(name, reached) for name in names}
    remedy = (
        "Give more or more varied samples, or leave them dense with "
        f"modules_to_not_convert={list(dict.fromkeys(experts[name] or name for name in names))}."
    )
    strange = [name for name in names if experts[name] is None]
    if strange:
        raise CalibrationError(
            f"no calibration token goes through {strange[0]}, and it is no expert among others that one goes "
            f"through: the model may read its weight in another way, or not use it with these samples. {remedy}"
        )
    what = f"no calibration token reached {counted(len(names), 'linear')} of experts, such as {names[0]}"
    if missed > MISSED * selected:
        raise CalibrationError(f"{what}, {missed / selected:.0%} of what is binarized in their block. {remedy}")
    warn(f"{what}: they are binarized to approximate their weights, without data. {remedy}")


def idle_expert(name: str, reached: Collection[str]) -> str | None:
    """The expert that a linear belongs to, if the same linear of another expert of its block was reached; else None."""
    parts, others = name.split("."), [other.split(".") for other in reached]
    for place in reversed([i for i, part in enumerate(parts) if part.isdigit()]):
        before, after = parts[:place], parts[place + 1 :]
        if any(len(o) == len(parts) and o[:place] == before and o[place + 1 :] == after for o in others):
            return ".".join(parts[: place + 1])
    return None
