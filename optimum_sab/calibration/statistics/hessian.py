"""The pass "hessian": second moments per modality, and how far the streams have drifted apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from optimum_sab.calibration.statistics.by_modality import Piece
from optimum_sab.calibration.statistics.group_inputs import GroupInputs
from optimum_sab.calibration.statistics.pairing import PairedInputs
from optimum_sab.calibration.statistics.passes import CalibrationPass, register_pass
from optimum_sab.core.hessian import InputMoments, InputStatistics


@dataclass(frozen=True)
class HalvedMoments:
    """Sums over one half of the samples, and over the others.

    Attributes:
        part: of the samples in `GroupInputs.half`; nothing where that is empty.
        rest: of the others.
    """

    part: InputMoments
    rest: InputMoments


@register_pass("hessian")
class HessianPass(CalibrationPass):
    """Second moments per modality, ``H_μ = 2/N_μ Σ x xᵀ``, and the drift between the streams (method.md section 1)."""

    weighting = "balanced"

    def collect(self, name: str, inputs: Sequence[PairedInputs], device: torch.device) -> InputStatistics:
        group = GroupInputs.alone(inputs)
        width = inputs[0].quantized.shape[-1] if inputs else 0
        return self.statistics(self.sums(name, group, width, device), bool(group.half))

    def sums(self, name: str, group: GroupInputs, width: int, device: torch.device) -> HalvedMoments:
        """Sums over the samples of this rank, which can be added up over ranks.

        Args:
            name: of the first linear, for messages.
            group: its inputs.
            width: of an input.
            device: where to compute.
        """
        found = {}
        for half in (True, False):
            found[half] = InputMoments(width, device, group.two_streams, name, weight=self.weight)
            _add(found[half], group.pieces(half), group.two_streams)
        return HalvedMoments(found[True], found[False])

    def statistics(self, sums: HalvedMoments, halved: bool) -> InputStatistics:
        """Statistics of the sums over all samples, which are used up."""
        return sums.rest.statistics(self.weighting, sums.part if halved else None, self.by_modality)


def _add(moments: InputMoments, given: Mapping[str, Sequence[Piece]], two_streams: bool, rows: int = 4096) -> None:
    """Add the samples by modality, about ``rows`` rows at a time: few large products instead of many small ones."""
    for modality, pieces in given.items():
        start = 0
        while start < len(pieces):
            end, count = start, 0
            while end < len(pieces) and count < rows:
                count += pieces[end].count
                end += 1
            batch = pieces[start:end]
            quantized = torch.cat([p.rows(p.pair.quantized) for p in batch])
            dense = (
                torch.cat([p.rows(p.pair.dense) for p in batch if p.pair.dense is not None]) if two_streams else None
            )
            residuals = [p.rows(r) for p in batch for r in [p.pair.residual] if r is not None]
            moments.add(modality, quantized, dense, torch.cat(residuals) if residuals else None)
            start = end
