"""What a run has found, stage by stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from optimum_sab.calibration.blocks.report import BlockReport
from optimum_sab.calibration.predictions.agreement import Agreement
from optimum_sab.calibration.predictions.temperature import Temperature
from optimum_sab.calibration.refine.tuning import Tuning


@dataclass(frozen=True)
class StageReport:
    """One stage.

    Attributes:
        name: its name.
        seconds: wall time.
        section: what it found; None where it says nothing.
    """

    name: str
    seconds: float
    section: Any = None


@dataclass(frozen=True)
class BinarizationReport:
    """The whole run.

    Attributes:
        stages: in the order in which they worked; those that had nothing to do are missing.
    """

    stages: tuple[StageReport, ...] = field(default=())

    def section(self, name: str) -> Any:
        """What the stage of a name found; None where it said nothing or did not work."""
        return next((stage.section for stage in self.stages if stage.name == name), None)

    @property
    def seconds(self) -> float:
        """Wall time in all."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def samples(self) -> int:
        """Calibration samples that were used."""
        found = self.section("samples")
        return 0 if found is None else int(found.count)

    @property
    def tokens(self) -> dict[str, int]:
        """Calibration tokens per modality."""
        found = self.section("samples")
        return {} if found is None else dict(found.tokens)

    @property
    def blocks(self) -> tuple[BlockReport, ...]:
        """Per decoder block."""
        return self.section("blocks") or ()

    @property
    def temperature(self) -> Temperature | None:
        """Of the model's predictions; None where it was left alone."""
        found: Temperature | None = self.section("temperature")
        return found

    @property
    def tuning(self) -> Tuning | None:
        """What the refinement made of the whole model; None without it."""
        found: Tuning | None = self.section("tuning")
        return found

    @property
    def agreement(self) -> Mapping[str, Agreement]:
        """With the dense model's predictions on samples that did not calibrate it, by kind; empty if not compared."""
        return self.section("comparison") or {}

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over weights, all binarized linears together."""
        layers = [layer for block in self.blocks for layer in block.layers]
        return sum(la.bits_per_weight * la.weights for la in layers) / sum(la.weights for la in layers)
