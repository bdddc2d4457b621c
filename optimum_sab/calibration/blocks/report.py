"""What is told of a binarized block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from optimum_sab.calibration.blocks.measured import BlockSignificance
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
        by_modality: ``Σ‖W x − Q x̂‖² / Σ‖W x‖²`` on some calibration tokens of each modality, x of the dense stream and
            x̂ of the quantized one (the same with one stream). Empty without a token.
    """

    name: str
    error: float
    bits_per_weight: float
    weights: int
    by_modality: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ExpertsReport:
    """The experts' linears of one name in a block.

    Attributes:
        name: of them all, with a star in the place of the expert.
        tokens: calibration tokens of each modality that came to each.
        mixed: how many had so few that they were solved with what came to the others, too; those without any among
            them.
    """

    name: str
    tokens: tuple[Mapping[str, int], ...]
    mixed: int

    @property
    def counts(self) -> list[int]:
        """Tokens that came to each expert."""
        return [sum(own.values()) for own in self.tokens]


@dataclass(frozen=True)
class BlockReport:
    """One decoder block.

    Attributes:
        index: position in the decoder.
        layers: its linears.
        drift: ``Σ‖h − ĥ‖² / Σ‖h‖²`` of the block's outputs between the streams; None with one stream.
        seconds: wall time of the block.
        reconstruction: what the refinement made of the block; None without it.
        significance: r and ρ of the linears that read its input first; None with one modality.
        experts: what came to its experts, where it has any.
        wire_bytes: what all ranks sent each other for it (`Ranks.wire_bytes`); 0 in one process.
    """

    index: int
    layers: tuple[LayerReport, ...]
    drift: float | None
    seconds: float
    reconstruction: Reconstruction | None = None
    significance: BlockSignificance | None = None
    experts: tuple[ExpertsReport, ...] = ()
    wire_bytes: int = 0

    @property
    def error(self) -> float:
        """Mean relative output error of the block's linears."""
        return sum(layer.error for layer in self.layers) / len(self.layers)

    @property
    def by_modality(self) -> dict[str, float]:
        """The same for each modality, of the linears that were given tokens of it."""
        names = dict.fromkeys(name for layer in self.layers for name in layer.by_modality)
        some = {name: [la.by_modality[name] for la in self.layers if name in la.by_modality] for name in names}
        return {name: sum(errors) / len(errors) for name, errors in some.items()}

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over weights of the block's linears."""
        return sum(la.bits_per_weight * la.weights for la in self.layers) / sum(la.weights for la in self.layers)
