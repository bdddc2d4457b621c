"""A decoder block as the lockstep has it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from optimum_sab.calibration.streams.experts import ExpertLinears
from optimum_sab.calibration.streams.placement import map_tensors


@dataclass(frozen=True)
class LockstepBlock:
    """A decoder block as the lockstep has it.

    Attributes:
        index: its place among the blocks that are visited.
        module: itself.
        forward: its own, before it was wrapped.
        linears: its target linears by dotted name.
        experts: those of them that are experts'.
        device: where its inputs are brought; None leaves them.
    """

    index: int
    module: nn.Module
    forward: Callable[..., Any]
    linears: Mapping[str, nn.Linear]
    experts: Sequence[ExpertLinears]
    device: torch.device | None

    def brought(self, call: Any) -> Any:
        """Arguments where the block computes."""
        return call if self.device is None else map_tensors(call, self.device)
