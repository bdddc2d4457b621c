"""Random linears of gemlite, for comparison: 1, 2 and 4 bits in groups of 128 with a scale and a zero per group."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from optimum_sab.bench.shapes import LinearShape
from optimum_sab.errors import ConfigError, MissingDependencyError
from optimum_sab.format.random_weight import SCALE

BITS = (1, 2, 4)
GROUP_SIZE = 128


def check_gemlite(device: torch.device, dtype: torch.dtype) -> None:
    """Whether gemlite can be measured here.

    Raises:
        MissingDependencyError: it is not installed, or there is no CUDA device, which it asks for at import.
        ConfigError: it does not compute on this device or in this dtype.
    """
    if importlib.util.find_spec("gemlite") is None:
        raise MissingDependencyError("--gemlite needs the package gemlite; install it with `pip install gemlite`.")
    if not torch.cuda.is_available():
        raise MissingDependencyError("--gemlite needs a CUDA device, and torch sees none; leave --gemlite out.")
    if device.type != "cuda":
        raise ConfigError(f"--gemlite needs a CUDA device, not {str(device)!r}; use --device cuda.")
    if dtype not in (torch.bfloat16, torch.float16):
        raise ConfigError(f"--gemlite is measured in bfloat16 or float16, not in {dtype}.")


def supports(shape: LinearShape) -> bool:
    """Whether gemlite takes this shape."""
    return shape.in_features % GROUP_SIZE == 0 and shape.out_features % 32 == 0


def gemlite_bytes(bits: int, shape: LinearShape) -> int:
    """Of the packed codes of a shape."""
    return shape.out_features * shape.in_features * bits // 8


def gemlite_linear(bits: int, shape: LinearShape, dtype: torch.dtype, device: torch.device, seed: int) -> Any:
    """A callable x [tokens, in] → [tokens, out]. The first call per number of tokens tunes the kernel, for minutes."""
    gemlite = importlib.import_module("gemlite")  # not at the top: it asks for a CUDA device at import
    gemlite.set_autotune("max")
    kind = gemlite.DType.BF16 if dtype == torch.bfloat16 else gemlite.DType.FP16
    layer = gemlite.GemLiteLinear(
        W_nbits=bits,
        group_size=GROUP_SIZE,
        in_features=shape.in_features,
        out_features=shape.out_features,
        input_dtype=kind,
        output_dtype=kind,
    )
    layer.pack(*_content(bits, shape, dtype, device, seed), None)
    return layer


def gemlite_weight(bits: int, shape: LinearShape, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """The dense fp32 weight [out, in] of `gemlite_linear` with the same arguments."""
    codes, scales, zeros = (t.float() for t in _content(bits, shape, dtype, device, seed))
    groups = codes.view(shape.out_features, -1, GROUP_SIZE)
    return ((groups - zeros[..., None]) * scales[..., None]).flatten(1)


def _content(
    bits: int, shape: LinearShape, dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [out, in], scales and zeros [out, in / 128] in dtype."""
    generator = torch.Generator(device).manual_seed(seed)
    size = (shape.out_features, shape.in_features)
    groups = (shape.out_features, shape.in_features // GROUP_SIZE)
    codes = torch.randint(0, 2**bits, size, dtype=torch.uint8, device=device, generator=generator)
    scales = SCALE * (0.5 + torch.rand(groups, device=device, generator=generator))
    zeros = torch.full(groups, (2**bits - 1) / 2, device=device)
    return codes, scales.to(dtype), zeros.to(dtype)
