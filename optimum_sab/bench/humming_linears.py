"""Random linears of Humming (`humming-kernels`), for comparison: 1- and 2-bit codes with a scale per 128 columns.

Written from the source of release 0.1.19 and not yet run on a GPU, which the package asks for as soon as a layer is
made. What was tried without one is that its shapes, its choice of kernels and its checks take what is given here; that
its kernels compute `humming_weight`, and that they can be captured in a CUDA graph, a GPU has to show.

- Without zero points a code c means c − 2^(bits − 1): at one bit −1 and 0, not −1 and 1. That is Humming's own
  "int1", and its fastest; signs would take a zero point per group on top.
- A layer compiles kernels for every number of tokens at its first call, 20 to 28 of them on Hopper. Here it is handed
  the one that it would choose for the tokens at hand, which compiles that one alone.
- Compiling needs CUDA's headers: the package's extra ``cu12`` or ``cu13``, whichever torch was built for.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from optimum_sab.bench.shapes import LinearShape
from optimum_sab.errors import ConfigError, MissingDependencyError
from optimum_sab.format.random_weight import SCALE

BITS = (1, 2)
GROUP_SIZE = 128
ROWS = 128  # its kernels for Hopper take whole ones of these


def check_humming(device: torch.device, dtype: torch.dtype) -> None:
    """Whether Humming can be measured here.

    Raises:
        MissingDependencyError: it is not installed, or there is no CUDA device.
        ConfigError: it does not compute on this device or in this dtype.
    """
    if importlib.util.find_spec("humming") is None:
        raise MissingDependencyError(
            "--humming needs the package humming-kernels; install it with `pip install humming-kernels[cu13]`, or "
            "[cu12] where torch was built for CUDA 12."
        )
    if not torch.cuda.is_available():
        raise MissingDependencyError("--humming needs a CUDA device, and torch sees none; leave --humming out.")
    if device.type != "cuda":
        raise ConfigError(f"--humming needs a CUDA device, not {str(device)!r}; use --device cuda.")
    if dtype not in (torch.bfloat16, torch.float16):
        raise ConfigError(f"--humming is measured in bfloat16 or float16, not in {dtype}.")


def supports(shape: LinearShape) -> bool:
    """Whether Humming takes this shape."""
    return shape.in_features % GROUP_SIZE == 0 and shape.out_features % ROWS == 0


def humming_bytes(bits: int, shape: LinearShape) -> int:
    """Bytes of the packed codes and of the scales."""
    count = shape.out_features * shape.in_features
    return count * bits // 8 + 2 * count // GROUP_SIZE


def humming_linear(bits: int, shape: LinearShape, dtype: torch.dtype, device: torch.device, seed: int) -> Any:
    """A callable x [tokens, in] → [tokens, out]. The first call per shape and number of tokens compiles."""
    layers = importlib.import_module("humming.layer")  # not at the top: importing it starts processes that compile
    ops = importlib.import_module("humming.ops")
    codes, scales = _content(bits, shape, dtype, device, seed)
    layer = layers.HummingLayer(
        shape_n=shape.out_features,
        shape_k=shape.in_features,
        weight_config={"dtype": f"int{bits}", "group_size": GROUP_SIZE},
        torch_dtype=dtype,
    ).to(device)
    layer.load_from_tensors({"weight": ops.pack_weight(codes, bits), "weight_scale": scales})
    layer.transform()  # into the order that the kernels read
    return _Prepared(layer)


def humming_weight(bits: int, shape: LinearShape, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """The dense fp32 weight [out, in] of `humming_linear` with the same arguments."""
    codes, scales = _content(bits, shape, dtype, device, seed)
    centred = (codes - (1 << (bits - 1))).float().unflatten(1, (-1, GROUP_SIZE))
    return (centred * scales.float()[..., None]).flatten(1)


class _Prepared:
    """A layer with the kernel that it would choose itself for each number of tokens."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._choose = importlib.import_module("humming.tune").get_heuristics_config
        self._chosen: dict[int, Any] = {}

    def __call__(self, inputs: Tensor) -> Tensor:
        tokens = len(inputs)
        if tokens not in self._chosen:
            self._chosen[tokens] = self._choose(self._layer.humming_config, shape_m=tokens, device=inputs.device)
        output: Tensor = self._layer(inputs, tuning_config=self._chosen[tokens])
        return output


def _content(
    bits: int, shape: LinearShape, dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[Tensor, Tensor]:
    """Codes int32 [out, in] and scales [out, in / 128] in dtype."""
    generator = torch.Generator(device).manual_seed(seed)
    size = (shape.out_features, shape.in_features)
    codes = torch.randint(0, 2**bits, size, dtype=torch.int32, device=device, generator=generator)
    scales = SCALE * (0.5 + torch.rand(size[0], size[1] // GROUP_SIZE, device=device, generator=generator))
    return codes, scales.to(dtype)
