"""The rows that a group of linears is given, told apart by modality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from optimum_sab.calibration.samples.modality import MIXED
from optimum_sab.calibration.statistics.pairing import PairedInputs


@dataclass(frozen=True)
class Piece:
    """The rows of one sample that are of one modality: those of the mask, all without one."""

    pair: PairedInputs
    mask: Tensor | None = None

    @property
    def count(self) -> int:
        """Rows."""
        return self.pair.quantized.shape[0] if self.mask is None else int(self.mask.sum())

    def rows(self, of: Tensor) -> Tensor:
        """Of [tokens, width] of the sample, those of the piece."""
        return of if self.mask is None else of[self.mask.to(of.device)]


def rows_by_modality(inputs: Sequence[PairedInputs], several: bool | None = None) -> dict[str, list[Piece]]:
    """What a group of linears is given, by modality; rows that cannot be told apart are `MIXED`.

    Args:
        inputs: of this rank's samples.
        several: whether any rank's can have more modalities than one; None where these are all.
    """
    if several is None:
        several = any(len(pair.modalities.names) > 1 for pair in inputs)
    pieces: dict[str, list[Piece]] = {}
    for pair in inputs:
        labels, names = pair.modalities.labels, pair.modalities.names
        if pair.routed or labels.numel() != pair.quantized.shape[0]:
            pieces.setdefault(MIXED if several else names[0], []).append(Piece(pair))
            continue
        for index, modality in enumerate(names):
            mask = labels == index
            if bool(mask.all()):
                pieces.setdefault(modality, []).append(Piece(pair))
            elif bool(mask.any()):
                pieces.setdefault(modality, []).append(Piece(pair, mask))
    return pieces
