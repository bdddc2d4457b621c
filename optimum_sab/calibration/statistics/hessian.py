"""The pass "hessian": second moments per modality, and how far the streams have drifted apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from optimum_sab.calibration.statistics.by_modality import rows_by_modality
from optimum_sab.calibration.statistics.pairing import PairedInputs
from optimum_sab.calibration.statistics.passes import CalibrationPass, register_pass
from optimum_sab.core.hessian import InputMoments, InputStatistics


@register_pass("hessian")
class HessianPass(CalibrationPass):
    """Second moments per modality, ``H_μ = 2/N_μ Σ x xᵀ``, and the drift between the streams (method.md section 1)."""

    weighting = "balanced"

    def collect(self, name: str, inputs: Sequence[PairedInputs], device: torch.device) -> InputStatistics:
        two_streams = bool(inputs) and all(pair.dense is not None for pair in inputs)
        width = inputs[0].quantized.shape[-1] if inputs else 0
        first, second = _halves(inputs) if two_streams and len(inputs) > 1 else ([], inputs)
        part = InputMoments(width, device, two_streams, name, weight=self.weight)
        _add(part, first, two_streams)
        moments = InputMoments(width, device, two_streams, name, weight=self.weight)
        _add(moments, second, two_streams)
        return moments.statistics(self.weighting, part if first else None, self.by_modality)


def _halves(inputs: Sequence[PairedInputs]) -> tuple[list[PairedInputs], list[PairedInputs]]:
    """Two halves of the samples, drawn, because neighbouring samples often take turns in kind."""
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = set(order[: len(inputs) // 2])
    return [p for i, p in enumerate(inputs) if i in chosen], [p for i, p in enumerate(inputs) if i not in chosen]


def _add(moments: InputMoments, inputs: Sequence[PairedInputs], two_streams: bool, rows: int = 4096) -> None:
    """Add the samples by modality, about ``rows`` rows at a time: few large products instead of many small ones."""
    for modality, pieces in rows_by_modality(inputs).items():
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
