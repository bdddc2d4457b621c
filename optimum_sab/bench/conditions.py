"""Under which conditions a benchmark measures."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from optimum_sab.core.code import NO_CODE
from optimum_sab.core.settings import LayerSettings


@dataclass(frozen=True)
class Conditions:
    """What all benchmarks are told.

    Args:
        settings: of the packed linears.
        device: CPU or CUDA.
        dtype: of activations and of what is dense.
        backend: name of a backend of the packed linears, or "auto".
        repeats: samples per median.
        seed: of all random content.
        busy: other processes that compute without end while times are taken once more; 0 for no such times.
        code: time packed linears of the same settings with this code as well; "none" for no such times.
    """

    settings: LayerSettings
    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    backend: str = "auto"
    repeats: int = 3
    seed: int = 0
    busy: int = 0
    code: str = NO_CODE
