"""From who waits at a group of linears to the statistics that their settings need."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from optimum_sab.calibration.samples.modality import TokenModalities
from optimum_sab.calibration.statistics.pairing import PairedInputs, pair_streams
from optimum_sab.calibration.statistics.passes import CalibrationPass
from optimum_sab.calibration.streams.visitor import Arrival
from optimum_sab.core.hessian import InputStatistics
from optimum_sab.core.settings import LayerSettings


@dataclass(frozen=True)
class Gathering:
    """A calibration pass over the samples of a run.

    Args:
        collector: the pass.
        modalities: of every sample's tokens.
    """

    collector: CalibrationPass
    modalities: Sequence[TokenModalities]

    def pairs(self, arrivals: Sequence[Arrival]) -> list[PairedInputs]:
        """What a group of linears is given, the streams of every sample side by side.

        Args:
            arrivals: who waits there.
        """
        return pair_streams(arrivals, self.modalities)

    def statistics(
        self,
        name: str,
        pairs: Sequence[PairedInputs],
        settings: Collection[LayerSettings],
        device: torch.device,
        by_modality: bool = False,
    ) -> InputStatistics:
        """Statistics of what a group of linears is given.

        Args:
            name: of the first linear, for messages.
            pairs: from `pairs`.
            settings: of the linears. Hessians of each modality, as large as that of all, are made only if one reads
                them, ...
            device: where to compute.
            by_modality: ... or whoever asks does.
        """
        self.collector.by_modality = by_modality or any(each.significance == "modality" for each in settings)
        return self.collector.collect(name, pairs, device)
