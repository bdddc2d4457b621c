"""What a packed layer asks of the layers it is computed with, whoever they are (input_group.py)."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn


class LayerGroup(Protocol):
    """Layers that share an input, as one of them sees it."""

    def output_of(self, member: nn.Module, inputs: Tensor) -> Tensor | None:
        """The member's output [..., out] for these inputs [..., in], or None: then it computes alone."""

    def direct_output_of(self, member: nn.Module, inputs: Tensor) -> Tensor | None:
        """The same on the CPU, past the dispatcher, for inputs of which `ops.cpu.direct.only_values` holds."""

    def forget(self) -> None:
        """The members' tensors are about to change."""
