"""From who waits at a group of linears to the statistics that their settings need."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optimum_sab.calibration.samples.modality import TokenModalities
from optimum_sab.calibration.statistics.pairing import PairedInputs, pair_streams
from optimum_sab.calibration.statistics.passes import CalibrationPass
from optimum_sab.calibration.streams.arrival import Arrival
from optimum_sab.core.factorization import WIDE
from optimum_sab.core.hessian import InputStatistics
from optimum_sab.core.magnitude import extreme_power
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
        weights: Mapping[str, Tensor],
        pairs: Sequence[PairedInputs],
        settings: Collection[LayerSettings],
        device: torch.device,
        by_modality: bool = False,
    ) -> InputStatistics:
        """Statistics of what a group of linears is given.

        Args:
            weights: of the linears, by dotted name; the first name is for messages.
            pairs: from `pairs`.
            settings: of the linears. Hessians of each modality, as large as that of all, are made only if one reads
                them, ...
            device: where to compute.
            by_modality: ... or whoever asks does.
        """
        self.collector.by_modality = by_modality or any(each.significance == "modality" for each in settings)
        self.collector.weight = _few_outputs(weights, pairs, device)
        try:
            return self.collector.collect(next(iter(weights)), pairs, device)
        finally:
            self.collector.weight = None


def _few_outputs(weights: Mapping[str, Tensor], pairs: Sequence[PairedInputs], device: torch.device) -> Tensor | None:
    """The weight where it saves work: ``(x − x̂) Wᵀ`` and its product with x̂ in the place of those with ``x − x̂``."""
    if len(weights) > 1 or not pairs:
        return None
    [weight] = weights.values()
    out, width = weight.shape
    known = pairs[0].residuals is not None  # then there is a product with the residual anyway
    if width < WIDE or width + known * out <= 2 * out:
        return None
    found = weight.detach().to(device, torch.float32)
    return None if extreme_power(found) else found  # whose products fp32 may not hold
