"""What the streams give to the output embedding when they have gone through all blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from optimum_sab.calibration.samples.modality import TokenModalities
from optimum_sab.calibration.streams.arrival import DENSE, QUANTIZED, Worker
from optimum_sab.errors import CalibrationError


@dataclass(frozen=True)
class HeadInputs:
    """What one sample gives to the output embedding in either stream.

    Attributes:
        sample: which of the run it is.
        dense: of the dense model, [1, tokens, width].
        binarized: of the binarized one.
        text: which tokens are judged, bool [tokens].
    """

    sample: int
    dense: Tensor
    binarized: Tensor
    text: Tensor


@dataclass(frozen=True)
class AtHead:
    """What was given to the output embedding, by sample and stream."""

    given: Mapping[Worker, Tensor]

    def pairs(self, modalities: Sequence[TokenModalities]) -> list[HeadInputs]:
        """Of the samples that came there in both streams."""
        found = []
        for (sample, stream), dense in self.given.items():
            binarized = self.given.get((sample, QUANTIZED))
            if stream == DENSE and binarized is not None and dense.shape == binarized.shape:
                found.append(HeadInputs(sample, dense, binarized, modalities[sample].judged(dense.shape[-2])))
        return found

    def teacher(self, sample: int) -> Tensor:
        """What the dense stream of a sample gave, [1, tokens, width].

        Raises:
            CalibrationError: it never came there.
        """
        if (sample, DENSE) not in self.given:
            raise CalibrationError(
                f"sample {sample} never comes to the model's output embedding; use refine_steps=0 for this model."
            )
        return self.given[sample, DENSE]
