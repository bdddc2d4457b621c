"""Samples that only read the dense model go through its blocks together, so that each block is fetched once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from optimum_sab.calibration.streams.arrival import QUANTIZED, Arrival
from optimum_sab.calibration.streams.experts import ExpertLinears, RoutedArrival
from optimum_sab.calibration.streams.lockstep import Lockstep
from optimum_sab.calibration.streams.mapped import MappedActivations
from optimum_sab.errors import CalibrationError


def given_together(
    model: nn.Module,
    samples: Sequence[Mapping[str, Any]],
    blocks: Sequence[nn.Module],
    head: nn.Module,
    device: torch.device | None = None,
    mapped: MappedActivations | None = None,
) -> list[Tensor]:
    """What the model gives to its output embedding for each sample, [1, tokens, width].

    Args:
        model: in eval mode.
        samples: forward keyword arguments, one dict per sample.
        blocks: the decoder blocks, in the order in which they are called.
        head: the output embedding.
        device: where the blocks compute; None leaves them where they are.
        mapped: what bounds the memory of samples that wait; None for no bound.

    Raises:
        CalibrationError: a sample never comes to the embedding.
        LockstepError: see `Lockstep.run`.
    """
    lockstep = Lockstep(model, blocks, [{} for _ in blocks], samples, False, device, mapped=mapped)
    workers = [(index, QUANTIZED) for index in range(len(samples))]
    found = lockstep.run(_Onlooker(), head=head, to_head=workers)
    missing = next((index for index, stream in workers if (index, stream) not in found), None)
    if missing is not None:
        raise CalibrationError(f"sample {missing} never comes to the output embedding of {type(model).__name__}.")
    return [found[worker] for worker in workers]


class _Onlooker:
    """A visitor of blocks in which nobody waits."""

    def enter(self, index: int) -> None:
        """Nothing is to be done."""

    def solve(self, names: tuple[str, ...], arrivals: Sequence[Arrival]) -> Mapping[str, Tensor]:
        return {}

    def solve_experts(self, linears: ExpertLinears, arrivals: Sequence[RoutedArrival]) -> Mapping[str, Tensor]:
        return {}

    def miss(self, names: Sequence[str]) -> None:
        """There are none."""

    def leave(self, index: int, drift: float | None) -> None:
        """Nothing is to be done."""
