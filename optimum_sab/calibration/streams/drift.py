"""How far the quantized stream is from the dense one at the end of a block."""

from __future__ import annotations

from collections.abc import Mapping

from optimum_sab.calibration.ranks import Ranks
from optimum_sab.calibration.streams.arrival import DENSE, QUANTIZED, Worker
from optimum_sab.calibration.streams.coroutines import Pause
from optimum_sab.calibration.streams.passage import hidden_states


def drift(ranks: Ranks, block: int, ends: Mapping[Worker, Pause]) -> float:
    """``Σ ‖h − ĥ‖² / Σ ‖h‖²`` of a block's outputs over all ranks' samples, dense against quantized stream.

    Args:
        ranks: who has samples.
        block: its index.
        ends: of this rank's coroutines, with the block's output.
    """
    sums = ranks.exchange(f"the end of block {block}", _differences(ends))
    above, below = (sum(each) for each in zip(*sums, strict=True))
    return above / below if below else 0.0


def _differences(ends: Mapping[Worker, Pause]) -> tuple[float, float]:
    """``Σ ‖h − ĥ‖²`` and ``Σ ‖h‖²`` of this rank's samples."""
    outputs = {worker: hidden_states(pause.payload) for worker, pause in ends.items()}
    above = below = 0.0
    for (sample, stream), dense in outputs.items():
        if stream == DENSE:
            above += float((dense.float() - outputs[sample, QUANTIZED].float()).square().sum())
            below += float(dense.float().square().sum())
    return above, below
