"""The samples of a run: forward arguments, and what each of their tokens shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from optimum_sab.calibration.ranks import Ranks
from optimum_sab.calibration.samples.modality import TokenModalities, token_modalities
from optimum_sab.core.spread import spread


@dataclass(frozen=True)
class CalibrationSamples:
    """Samples as the model reads them.

    Attributes:
        inputs: keyword arguments of the model's forward, one dict per sample.
        modalities: of every sample's tokens.
        ranks: who reads them: every rank has all of them, and works on its own.
    """

    inputs: Sequence[Mapping[str, Any]]
    modalities: Sequence[TokenModalities]
    ranks: Ranks = field(default_factory=Ranks)

    @classmethod
    def of(cls, inputs: Sequence[Mapping[str, Any]], config: Any, ranks: Ranks | None = None) -> CalibrationSamples:
        """Samples of a model with this config."""
        return cls(inputs, [token_modalities(sample, config) for sample in inputs], ranks or Ranks())

    @cached_property
    def own(self) -> list[int]:
        """Indices of this rank's samples."""
        return self.ranks.own([each.labels.numel() for each in self.modalities])

    def __len__(self) -> int:
        return len(self.inputs)

    def spread(self, most: int) -> CalibrationSamples:
        """At most so many of them, evenly spread."""
        chosen = spread(len(self), most)
        return CalibrationSamples([self.inputs[i] for i in chosen], [self.modalities[i] for i in chosen], self.ranks)
