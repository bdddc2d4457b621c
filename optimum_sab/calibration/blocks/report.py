"""What is told of a binarized block."""

from __future__ import annotations

from dataclasses import dataclass

from optimum_sab.calibration.refine.reconstruction import Reconstruction


@dataclass(frozen=True)
class LayerReport:
    """One binarized linear.

    Attributes:
        name: dotted name.
        error: relative output error against the propagated target on the calibration inputs, of all the linears
            that share its input together: they are solved as one stack.
        bits_per_weight: from stored bytes, bias included.
        weights: how many.
    """

    name: str
    error: float
    bits_per_weight: float
    weights: int


@dataclass(frozen=True)
class BlockReport:
    """One decoder block.

    Attributes:
        index: position in the decoder.
        layers: its linears.
        drift: ``Σ‖h − ĥ‖² / Σ‖h‖²`` of the block's outputs between the streams; None with one stream.
        seconds: wall time of the block.
        reconstruction: what the refinement made of the block; None without it.
    """

    index: int
    layers: tuple[LayerReport, ...]
    drift: float | None
    seconds: float
    reconstruction: Reconstruction | None = None

    @property
    def error(self) -> float:
        """Mean relative output error of the block's linears."""
        return sum(layer.error for layer in self.layers) / len(self.layers)
