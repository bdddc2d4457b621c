"""``y = x Ŵᵀ + b`` with a packed weight: which kernel runs for how many tokens, and its launch."""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import torch
import triton
from torch import Tensor

from .decode import decode_kernel
from .dequantize import dequantize_kernel
from .geometry import TILE_ROWS, Geometry, ceil_div
from .prepare import prepare_floats_kernel, prepare_limbs_kernel
from .small_batch import small_batch_kernel
from .tuning import AUTOTUNE, Launch, candidates, default_launch, launch_cache

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_SPLIT = 16
MAX_STACK = 4
DENSE_WARPS = 4  # and row tiles of a program that makes the weight dense
# tables of the byte permutation (operand.py), as signed integers: 0xFF00FF00, 0xFFFF0000, 0x01010101
_TABLES = {"even": -16711936, "pair": -65536, "ones": 0x01010101}


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
    tokens = x.shape[0]
    parts = [torch.empty(tokens, size, dtype=x.dtype, device=x.device) for size in sizes]
    if tokens == 0:
        return parts
    if x.stride(1) != 1:
        x = x.contiguous()
    product = _Product(x, tensors, geometry, sizes, tuple(b.contiguous() for b in biases), parts)
    with _on(x.device):
        _run(product, launch or _launch(product))
    return parts


@dataclass(frozen=True)
class _Product:
    """One call: what is multiplied and where to."""

    x: Tensor
    tensors: dict[str, Tensor]
    geometry: Geometry
    sizes: tuple[int, ...]
    biases: tuple[Tensor, ...]
    parts: list[Tensor]

    @property
    def tokens(self) -> int:
        return self.x.shape[0]

    @property
    def slot_tiles(self) -> int:
        return self.geometry.slot_tiles if self.geometry.residual_planes else 0

    @property
    def bounds(self) -> tuple[int, int, int]:
        """First rows of the second to fourth layer, or the number of rows."""
        starts = [*accumulate(self.sizes), self.geometry.rows, self.geometry.rows]
        return starts[0], starts[1], starts[2]

    @property
    def outputs(self) -> list[Tensor]:
        """Four tensors to write to; kernels do not touch those past the layers' number."""
        return [*self.parts, *[self.parts[0]] * (MAX_STACK - len(self.parts))]

    @property
    def bias_pointers(self) -> list[Tensor]:
        """Four tensors to read from; kernels do not touch those past the layers' number, nor any without biases."""
        first = self.biases[0] if self.biases else self.tensors["weight"]
        return [*self.biases, *[first] * (MAX_STACK - len(self.biases))]

    def space(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.x.device)

    def tensor(self, name: str) -> Tensor:
        """A tensor of the layer, or any other where the layer has none: the kernel does not read it then."""
        return self.tensors.get(name, self.tensors["weight"])


def dequantize(
    tensors: dict[str, Tensor], geometry: Geometry, dtype: torch.dtype = torch.float32, rows: slice | None = None
) -> Tensor:
    """The dense weight [rows, columns], or a run of its rows that starts at a multiple of 32.

    Raises:
        ValueError: ``rows`` does not start at a multiple of 32.
    """
    start, stop, _ = (rows or slice(None)).indices(geometry.rows)
    if start % TILE_ROWS:
        raise ValueError(f"rows start at {start}; dequantization starts at a multiple of {TILE_ROWS}.")
    out = torch.empty(max(0, stop - start), geometry.columns, dtype=dtype, device=tensors["weight"].device)
    if out.numel():
        with _on(out.device):
            _dequantize_into(out, tensors, geometry, start, stop)
    return out


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


def _run(product: _Product, launch: Launch) -> None:
    which = regime(product.tokens, product.x.dtype, launch)
    if which == "decode":
        _decode(product, launch)
    elif which == "small_batch":
        _small_batch(product, launch)
    else:
        _dense(product, launch)


def _decode(product: _Product, launch: Launch) -> None:
    x, geometry, device = product.x, product.geometry, _device(product.x.device)
    tokens = product.tokens
    places = 4 if tokens <= 4 else 8  # columns of the matrix operand: two for a token
    slot_places = 2 if tokens <= 2 else places
    # with 8 tokens two row tiles do not fit in registers on every device
    tiles = launch.decode_tiles if geometry.row_tiles % launch.decode_tiles == 0 and places == 4 else 1
    programs = geometry.row_tiles // tiles
    split = _split(programs, launch.decode_programs * device.processors, geometry.column_tiles)
    column_tiles, slot_tiles = geometry.column_tiles, product.slot_tiles
    base_limb = product.space(column_tiles, 256 * places, dtype=torch.int8)
    base_start = product.space(column_tiles, 128 // geometry.scale_columns, places, dtype=torch.int32)
    base_unit = product.space(column_tiles, places, dtype=torch.float32)
    slot_limb = product.space(slot_tiles, 512 * slot_places, dtype=torch.int8)
    slot_start = product.space(slot_tiles, 4, 2, slot_places, dtype=torch.int32)
    slot_unit = product.space(slot_tiles, 4, 2, slot_places, dtype=torch.float32)
    counters = programs if split > 1 else 0
    counter = product.space(counters, dtype=torch.int32)
    partial = product.space(counters * split * slot_places * tiles * 32, dtype=torch.float32)
    prepare_limbs_kernel[(column_tiles + slot_tiles,)](
        x,
        product.tensor("col_scale"),
        product.tensor("residual_index"),
        base_limb,
        base_start,
        base_unit,
        slot_limb,
        slot_start,
        slot_unit,
        counter,
        tokens,
        geometry.columns,
        x.stride(0),
        column_tiles,
        counters,
        COUNTERS_EACH=triton.next_power_of_2(max(1, ceil_div(counters, column_tiles + slot_tiles))),
        TOKENS=places,
        SLOT_TOKENS=slot_places,
        SCALE_COLUMNS=geometry.scale_columns,
    )
    decode_kernel[(programs, split)](
        product.tensor("weight"),
        product.tensor("residual_sign"),
        product.tensor("row_scale"),
        product.tensor("row_exponent"),
        *product.bias_pointers,
        base_limb,
        base_start,
        base_unit,
        slot_limb,
        slot_start,
        slot_unit,
        partial,
        counter,
        *product.outputs,
        tokens,
        *product.bounds,
        geometry.rows,
        column_tiles,
        slot_tiles,
        geometry.blocks,
        **_TABLES,
        **_layer_constants(geometry),
        SCALE_COLUMNS=geometry.scale_columns,
        NATIVE_FP8=device.native_fp8,
        HAS_BIAS=bool(product.biases),
        STACK=len(product.sizes),
        TILES=tiles,
        TOKENS=places,
        SLOT_TOKENS=slot_places,
        SPLIT=split,
        UNROLL=launch.decode_unroll,
        ASM=device.asm,
        num_warps=1,
        num_stages=1,
    )


def _small_batch(product: _Product, launch: Launch) -> None:
    x, geometry, device = product.x, product.geometry, _device(product.x.device)
    tokens, warps = product.tokens, launch.batch_warps
    # fp32 operands are split in three and take three times the registers
    most = 16 if x.dtype == torch.float32 else launch.batch_tokens
    places = min(most, max(16, triton.next_power_of_2(tokens)))
    padded = ceil_div(tokens, places) * places
    row_programs, token_programs = ceil_div(geometry.row_tiles, warps), padded // places
    split = _split(row_programs * token_programs, launch.batch_programs * device.processors, geometry.column_tiles)
    column_tiles, slot_tiles = geometry.column_tiles, product.slot_tiles
    wide_lanes = not (device.warpgroup and warps % 4 == 0 and x.dtype != torch.float32)
    prepared = product.space(column_tiles + slot_tiles, 4, padded, 32, dtype=x.dtype)
    counters = row_programs * token_programs if split > 1 else 0
    counter = product.space(counters, dtype=torch.int32)
    partial = product.space(counters * split * places * warps * 32, dtype=torch.float32)
    grid = (column_tiles + slot_tiles, padded // 16)
    prepare_floats_kernel[grid](
        x,
        product.tensor("col_scale"),
        product.tensor("residual_index"),
        prepared,
        counter,
        tokens,
        padded,
        geometry.columns,
        x.stride(0),
        column_tiles,
        counters,
        COUNTERS_EACH=triton.next_power_of_2(max(1, ceil_div(counters, grid[0] * grid[1]))),
        TOKENS=16,
        WIDE_LANES=wide_lanes,
    )
    small_batch_kernel[(row_programs, token_programs, split)](
        product.tensor("weight"),
        product.tensor("residual_sign"),
        product.tensor("row_scale"),
        product.tensor("row_exponent"),
        *product.bias_pointers,
        prepared,
        partial,
        counter,
        *product.outputs,
        tokens,
        padded,
        *product.bounds,
        geometry.rows,
        geometry.row_tiles,
        column_tiles,
        slot_tiles,
        geometry.blocks,
        **_layer_constants(geometry),
        NATIVE_FP8=device.native_fp8,
        HAS_BIAS=bool(product.biases),
        STACK=len(product.sizes),
        TILES=warps,
        TOKENS=places,
        SPLIT=split,
        WIDE_LANES=wide_lanes,
        PRECISION="tf32x3" if x.dtype == torch.float32 and device.asm else "ieee",
        ASM=device.asm,
        num_warps=warps,
        num_stages=launch.batch_stages,
    )


def _dense(product: _Product, launch: Launch) -> None:
    """Pieces of rows: made dense into one scratch buffer, multiplied, the buffer used again."""
    x, geometry = product.x, product.geometry
    piece = max(1, launch.dense_bytes // (x.element_size() * geometry.columns * TILE_ROWS)) * TILE_ROWS
    scratch = product.space(min(piece, max(product.sizes)), geometry.columns, dtype=x.dtype)
    first = 0
    for index, (part, size) in enumerate(zip(product.parts, product.sizes)):
        for start in range(0, size, piece):
            stop = min(start + piece, size)
            weight = scratch[: stop - start]
            _dequantize_into(weight, product.tensors, geometry, first + start, first + stop)
            if stop - start == size:
                torch.mm(x, weight.T, out=part)
            else:
                part[:, start:stop] = x @ weight.T
        if product.biases:
            part += product.biases[index].to(part.dtype)
        first += size


def _layer_constants(geometry: Geometry) -> dict[str, int | bool]:
    return {
        "BASE": geometry.base_planes,
        "RESIDUAL": geometry.residual_planes,
        "BLOCK_SIZE": geometry.block_size,
        "SLOTS_PER_BLOCK": max(1, geometry.slots_per_block),
        "FP8": geometry.fp8,
    }


def _dequantize_into(out: Tensor, tensors: dict[str, Tensor], geometry: Geometry, start: int, stop: int) -> None:
    device = _device(out.device)
    residual = geometry.residual_planes
    places = tensors["residual_index"][geometry.slot_tiles * 128 :] if residual else tensors["weight"]
    row_tiles = ceil_div(stop, TILE_ROWS)
    first = start // TILE_ROWS
    dequantize_kernel[(ceil_div(row_tiles - first, DENSE_WARPS), 2 * geometry.column_tiles)](
        tensors["weight"],
        tensors["residual_sign"] if residual else tensors["weight"],
        places,
        tensors["row_scale"],
        tensors.get("row_exponent", tensors["weight"]),
        tensors["col_scale"],
        out,
        first,
        stop,
        row_tiles,
        geometry.columns,
        geometry.column_tiles,
        geometry.slot_tiles if residual else 0,
        geometry.blocks,
        **{**_layer_constants(geometry), "SLOTS_PER_BLOCK": geometry.slots_per_block if residual else 0},
        NATIVE_FP8=device.native_fp8,
        TILES=DENSE_WARPS,
        WIDE_LANES=not device.warpgroup,
        ASM=device.asm,
        num_warps=DENSE_WARPS,
        num_stages=1,  # nothing to load ahead of, and no registers left for it
    )


def _split(programs: int, wanted: int, tiles: int) -> int:
    """Parts of the columns: a power of two that brings ``programs`` near ``wanted``, with two tiles to a part."""
    split = 1
    while split < MAX_SPLIT and programs * split * 2 <= wanted and split * 4 <= tiles:
        split *= 2
    return split


class _Device:
    """What launches depend on of a device."""

    def __init__(self, device: torch.device) -> None:
        self.processors, self.native_fp8, self.asm, self.warpgroup = 2, False, False, False
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            self.processors = properties.multi_processor_count
            if torch.version.hip is None and os.environ.get("TRITON_INTERPRET") != "1":
                self.native_fp8 = (properties.major, properties.minor) >= (8, 9)
                self.warpgroup = properties.major == 9
                self.asm = True
        elif device.type != "cpu":
            properties = torch.get_device_module(device).get_device_properties(device)
            self.processors = getattr(properties, "max_compute_units", 64)


@cache
def _device(device: torch.device) -> _Device:
    return _Device(device)


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Kernels launch on the current device."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def _launch(product: _Product) -> Launch:
    device = product.x.device
    if device.type != "cuda":
        return Launch()
    launch = default_launch(device)
    if os.environ.get(AUTOTUNE) != "1" or torch.cuda.is_current_stream_capturing():
        return launch
    from triton.testing import do_bench

    tokens, geometry = product.tokens, product.geometry
    bucket = tokens if tokens <= 8 else triton.next_power_of_2(tokens)
    planes = f"{geometry.base_planes}+{geometry.residual_planes}"
    key = f"{bucket}x{geometry.rows}x{geometry.columns} {planes} {geometry.block_size} {product.x.dtype}"

    def time(candidate: Launch) -> float:
        return do_bench(lambda: _run(product, candidate), warmup=5, rep=20, return_mode="median")

    return launch_cache(device).measured(key, candidates(tokens, launch), time)
