"""The samples of a run: forward arguments, and what each of their tokens shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optimum_sab.calibration.samples.modality import TokenModalities, token_modalities
from optimum_sab.core.spread import spread


@dataclass(frozen=True)
class CalibrationSamples:
    """Samples as the model reads them.

    Attributes:
        inputs: keyword arguments of the model's forward, one dict per sample.
        modalities: of every sample's tokens.
    """

    inputs: Sequence[Mapping[str, Any]]
    modalities: Sequence[TokenModalities]

    @classmethod
    def of(cls, inputs: Sequence[Mapping[str, Any]], config: Any) -> CalibrationSamples:
        """Samples of a model with this config."""
        return cls(inputs, [token_modalities(sample, config) for sample in inputs])

    def __len__(self) -> int:
        return len(self.inputs)

    def spread(self, most: int) -> CalibrationSamples:
        """At most so many of them, evenly spread."""
        chosen = spread(len(self), most)
        return CalibrationSamples([self.inputs[i] for i in chosen], [self.modalities[i] for i in chosen])
