"""What is told of a block beside its error: error by modality, and how far its significance is that of one modality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from optimum_sab.calibration.statistics.by_modality import Piece
from optimum_sab.calibration.statistics.group_inputs import GroupInputs
from optimum_sab.core.factorization import factor_hessian
from optimum_sab.core.hessian import InputStatistics
from optimum_sab.core.magnitude import extreme_power, times_power
from optimum_sab.core.significance import significance_map
from optimum_sab.errors import SingularHessianError

if TYPE_CHECKING:
    from torch import Tensor

ROWS = 256  # tokens of a modality by which its error is told


@dataclass(frozen=True)
class BlockSignificance:
    """Of the linears that read a block's input first (method.md sections 2 to 4).

    Attributes:
        ratio: r, the share of their significance mass that is of one modality alone, 0 to 1.
        spatial: ρ, mean over input columns; 1 where a column matters to one modality alone, 0 where equally to all.
    """

    ratio: float
    spatial: float


def block_significance(
    weight: Tensor, statistics: InputStatistics, damping: float, name: str = "the layer"
) -> BlockSignificance | None:
    """r and ρ of linears that share an input; None with one modality, or where an inverse Hessian has no factor.

    Args:
        weight: float32 [out, in], the linears' one above the other, on the statistics' device.
        statistics: with Hessians of each modality.
        damping: as in `factor_hessian`.
        name: of the first linear, for messages.
    """
    if len(statistics.by_modality) < 2:
        return None
    try:
        inverse = [factor_hessian(H, damping, name).inverse_diagonal for H in statistics.by_modality.values()]
    except SingularHessianError:
        return None
    power = extreme_power(weight)
    found = significance_map(times_power(weight, -power) if power else weight, torch.stack(inverse))
    return BlockSignificance(found.ratio, float(found.spatial.mean()))


@dataclass(frozen=True)
class ModalityRows:
    """Some tokens of each modality at a group of linears, of this rank's samples.

    Attributes:
        rows: by modality, x̂ and x, float32 [tokens, in]: of the quantized and of the dense stream. The same with one
            stream.
    """

    rows: Mapping[str, tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, group: GroupInputs, device: torch.device) -> ModalityRows:
        """At most about `ROWS` of each modality on all ranks together, evenly spread."""
        found, tokens = {}, group.count
        for modality, pieces in group.pieces().items():
            step = max(1, tokens[modality] // ROWS)
            mine = [_thinned(piece, piece.pair.quantized, step) for piece in pieces]
            dense = [_thinned(p, p.pair.quantized if p.pair.dense is None else p.pair.dense, step) for p in pieces]
            found[modality] = (torch.cat(mine).to(device, torch.float32), torch.cat(dense).to(device, torch.float32))
        return cls(found)

    def sums(self, weight: Tensor, approximation: Tensor) -> dict[str, tuple[float, float]]:
        """``Σ‖W x − Q x̂‖²`` and ``Σ‖W x‖²`` of each modality.

        Args:
            weight: W, float32 [out, in].
            approximation: Q, the same.
        """
        found = {}
        for modality, (mine, dense) in self.rows.items():
            wanted = dense @ weight.T
            below = float(wanted.square().sum(dtype=torch.float64))
            above = float((wanted - mine @ approximation.T).square().sum(dtype=torch.float64))
            found[modality] = above, below
        return found


def errors_of(ranks: Sequence[Mapping[str, tuple[float, float]]]) -> dict[str, float]:
    """``Σ‖W x − Q x̂‖² / Σ‖W x‖²`` of each modality; 0 where the dense output is zero.

    Args:
        ranks: what `ModalityRows.sums` gives on each.
    """
    found = {}
    for modality in dict.fromkeys(name for each in ranks for name in each):
        above, below = (sum(each[modality][k] for each in ranks if modality in each) for k in (0, 1))
        found[modality] = above / below if below else 0.0
    return found


def _thinned(piece: Piece, of: Tensor, step: int) -> Tensor:
    return piece.rows(of)[::step]
