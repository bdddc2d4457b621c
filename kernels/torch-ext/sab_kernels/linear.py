"""``y = x Ŵᵀ + b`` with a packed weight, and which kernel computes it for how many tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .arguments import MAX_STACK
from .decode import multiply_decode
from .dense import multiply_dense
from .device import computing_dtype, on_device
from .geometry import TILE_ROWS, Geometry
from .product import Product
from .small_batch import multiply_small_batch
from .tuning import Launch, candidates, device_launch, fastest, settings_key, tunes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def binary_linear(
    x: Tensor, tensors: dict[str, Tensor], geometry: Geometry, bias: Tensor | None = None, launch: Launch | None = None
) -> Tensor:
    """``x Ŵᵀ + b`` [tokens, rows] in x's dtype.

    Three ways by the number of tokens: a few through the 8-bit matrix unit (decode.py; not for fp32 activations, which
    it would round to 15 bits), more through operands made in registers (small_batch.py), many by making the weight
    dense piece by piece, which ordinary products then use.

    Args:
        x: [tokens, columns], fp32, bf16 or fp16; any strides.
        tensors: the layer in the kernel layout (layout.py).
        geometry: the layer's shape.
        bias: [rows], floating, or None.
        launch: settings; the device's own when None.

    Raises:
        ValueError: shape, dtype or device of ``x`` does not fit; the message has the value.
    """
    return stacked_linear(x, tensors, geometry, (geometry.rows,), () if bias is None else (bias,), launch)[0]


def stacked_linear(
    x: Tensor,
    tensors: dict[str, Tensor],
    geometry: Geometry,
    sizes: tuple[int, ...],
    biases: Sequence[Tensor] = (),
    launch: Launch | None = None,
) -> list[Tensor]:
    """`binary_linear` of up to four layers stacked by rows, in one launch.

    Args:
        tensors: of the layers together: concatenated along the first dimension of every tensor that has rows.
        geometry: of the layers together.
        sizes: rows of every layer; all but the last a multiple of 32.
        biases: [its rows] of every layer, of one dtype, or none of any.

    Returns:
        One contiguous [tokens, its rows] per layer.

    Raises:
        ValueError: as `binary_linear`, or ``sizes`` do not fit.
    """
    _check(x, tensors, geometry)
    if len(sizes) > MAX_STACK or sum(sizes) != geometry.rows or any(size % TILE_ROWS for size in sizes[:-1]):
        raise ValueError(
            f"layers of {sizes} rows cannot be stacked to {geometry.rows}: at most {MAX_STACK}, all but the last a "
            f"multiple of {TILE_ROWS}."
        )
    if biases and [b.numel() for b in biases] != list(sizes):
        raise ValueError(f"biases of {[b.numel() for b in biases]} values do not belong to layers of {sizes} rows.")
    tokens, dtype = x.shape[0], computing_dtype(x.dtype, x.device)
    if dtype != x.dtype:
        wide = stacked_linear(x.to(dtype), tensors, geometry, sizes, biases, launch)
        return [each.to(x.dtype) for each in wide]
    outputs = [torch.empty(tokens, size, dtype=x.dtype, device=x.device) for size in sizes]
    if tokens == 0:
        return outputs
    if x.stride(1) != 1:
        x = x.contiguous()
    product = Product(x, tensors, geometry, sizes, tuple(b.contiguous() for b in biases), tuple(outputs))
    with on_device(x.device):
        _run(product, launch or _launch(product))
    return outputs


def regime(tokens: int, dtype: torch.dtype, launch: Launch) -> str:
    """Which kernel runs: ``"decode"``, ``"small_batch"`` or ``"dense"``."""
    if tokens <= launch.decode_tokens and dtype != torch.float32:
        return "decode"
    return "small_batch" if tokens < launch.dense_tokens else "dense"


def _check(x: Tensor, tensors: dict[str, Tensor], geometry: Geometry) -> None:
    if x.dim() != 2 or x.shape[1] != geometry.columns:
        raise ValueError(f"the input is {tuple(x.shape)}; the layer takes [tokens, {geometry.columns}].")
    if x.dtype not in DTYPES:
        raise ValueError(f"the input is {x.dtype}; the kernels take float32, bfloat16 or float16.")
    if x.device != tensors["weight"].device:
        raise ValueError(f"the input is on {x.device}, the weight on {tensors['weight'].device}; move one of them.")


def _run(product: Product, launch: Launch) -> None:
    _WAYS[regime(product.tokens, product.x.dtype, launch)](product, launch)


_WAYS = {"decode": multiply_decode, "small_batch": multiply_small_batch, "dense": multiply_dense}


def _launch(product: Product) -> Launch:
    device, tokens = product.x.device, product.tokens
    launch = device_launch(device)
    if not tunes(device):
        return launch
    key = settings_key(tokens, product.geometry, product.x.dtype)
    return fastest(device, key, candidates(tokens, launch), lambda option: _run(product, option))
