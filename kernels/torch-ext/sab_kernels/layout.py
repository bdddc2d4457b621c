"""The layout kernels read, and the exact way there from the stored tensors and back.

Signs lie in tiles of 32 rows by 128 columns, 512 bytes each, in the order in which a warp holds the operand of a matrix
instruction: lane 4 g + q holds four words, word r for row 8 r + g. Bit 16 h + 4 i + s of that word is column
32 s + 16 h + 4 q + i of the tile. One byte permutation then gives four 8-bit operands of step s (decode.py), and one
shift and one logic operation give two 16-bit ones (small_batch.py).

Rows are the outermost dimension of every tensor that has them, so layers that share an input can be stacked.

| name | kernel layout |
|---|---|
| weight | int32 [row tiles, column tiles, base planes, 128 words (g, q, r)] |
| residual_sign | int32 [row tiles, slot tiles, residual planes, 128 words] |
| residual_index | int32 [128 · (slot tiles + column tiles)]: columns by place, then places by column |
| row_scale | uint8 or int16 [row tiles, blocks, planes, 32 (g, r)] |
| row_exponent | int8 [32 · row tiles], only with fp8 |
| col_scale | int16 [128 · column tiles] |

Where planes are derived of the first one by a code, lane 4 g + q holds words q of its rows, as they are stored: bit b
is column 32 q + b. Planes beside it have bit 16 h + k for column 32 q + 2 k + h, so that activations are in the same
order for both (coded.py); the residual's slots are as ever.

A block's salient columns fill whole slots of 16 places. Where a slot is not full, the place has column −1; a column
that is not salient has place −1. All other padding is zero.
"""

import torch
from torch import Tensor

from .code_words import check_code
from .geometry import SLOT, TILE_COLUMNS, TILE_ROWS, Geometry, ceil_div

_WORDS = 4  # 32-bit words in a row of a tile
_PAIR = 0x00010001  # one bit in either half of a word


def to_kernel_layout(stored: dict[str, Tensor], geometry: Geometry) -> dict[str, Tensor]:
    """The stored tensors of one layer (docs/format.md) in the layout the kernels read, on the same device."""
    check_code(geometry.code)
    words = _padded_words(stored["weight"], geometry)
    tile = _tile_coded_words if geometry.code else _tile_words
    tensors = {"weight": tile(words, geometry.row_tiles)}
    if geometry.residual_planes:
        place = _slot_places(geometry, stored["weight"].device)
        words = _words_of(stored["residual_sign"], place, geometry)
        tensors["residual_sign"] = _tile_words(words, geometry.row_tiles)
        tensors["residual_index"] = _global_index(stored["residual_index"], place, geometry)
    scale = stored["row_scale"]
    planes, blocks, rows = scale.shape
    pad_rows = (0, geometry.row_tiles * TILE_ROWS - rows)
    scale = torch.nn.functional.pad(scale, pad_rows)
    scale = scale.view(planes, blocks, geometry.row_tiles, 4, 8).permute(2, 1, 0, 4, 3)
    tensors["row_scale"] = scale.reshape(geometry.row_tiles, blocks, planes, TILE_ROWS).contiguous()
    if geometry.fp8:
        tensors["row_exponent"] = torch.nn.functional.pad(stored["row_exponent"], pad_rows)
    pad_columns = (0, geometry.column_tiles * TILE_COLUMNS - geometry.columns)
    tensors["col_scale"] = torch.nn.functional.pad(stored["col_scale"], pad_columns)
    return tensors


def from_kernel_layout(tensors: dict[str, Tensor], geometry: Geometry) -> dict[str, Tensor]:
    """Inverse of `to_kernel_layout`: exactly the stored tensors."""
    rows, columns = geometry.rows, geometry.columns
    untile = _untile_coded_words if geometry.code else _untile_words
    words = untile(tensors["weight"])[:, :rows, : ceil_div(columns, 32)]
    stored = {"weight": words.contiguous()}
    if geometry.residual_planes:
        place = _slot_places(geometry, words.device)
        signs = _untile_words(tensors["residual_sign"])[:, :rows]
        stored["residual_sign"] = _pack_bytes(_unpack_bytes(signs.contiguous().view(torch.uint8))[..., place])
        columns_of = tensors["residual_index"][place]
        wide = torch.uint8 if geometry.block_size <= 256 else torch.int16
        stored["residual_index"] = (columns_of % geometry.block_size).to(wide)
    scale = tensors["row_scale"].view(geometry.row_tiles, geometry.blocks, geometry.planes, 8, 4)
    scale = scale.permute(2, 1, 0, 4, 3).reshape(geometry.planes, geometry.blocks, -1)
    stored["row_scale"] = scale[..., :rows].contiguous()
    if geometry.fp8:
        stored["row_exponent"] = tensors["row_exponent"][:rows].clone()
    stored["col_scale"] = tensors["col_scale"][:columns].clone()
    return stored


def kernel_bytes(geometry: Geometry) -> int:
    """Bytes of a layer in the kernel layout."""
    signs = geometry.column_tiles * geometry.base_planes + geometry.slot_tiles * geometry.residual_planes
    scales = geometry.blocks * geometry.planes * (1 if geometry.fp8 else 2)
    per_row = TILE_COLUMNS // 8 * signs + scales + (1 if geometry.fp8 else 0)
    places = geometry.slot_tiles + geometry.column_tiles if geometry.residual_planes else 0
    index = 4 * TILE_COLUMNS * places
    return per_row * TILE_ROWS * geometry.row_tiles + index + 2 * TILE_COLUMNS * geometry.column_tiles


def _padded_words(words: Tensor, geometry: Geometry) -> Tensor:
    """int32 [planes, rows, words] padded to whole tiles."""
    pad = (0, geometry.column_tiles * _WORDS - words.shape[2], 0, geometry.row_tiles * TILE_ROWS - words.shape[1])
    return torch.nn.functional.pad(words, pad)


def _slot_places(geometry: Geometry, device: torch.device) -> Tensor:
    """Place among the slots' columns of every salient column, int64 [salient], ascending."""
    width = geometry.slots_per_block * SLOT
    counts = geometry.salient_counts
    places = [torch.arange(count) + block * width for block, count in enumerate(counts)]
    return torch.cat(places).to(device)


def _words_of(residual_sign: Tensor, place: Tensor, geometry: Geometry) -> Tensor:
    """uint8 [planes, rows, bytes] to int32 [planes, 32 · row tiles, 4 · slot tiles], slots padded."""
    planes, rows, _ = residual_sign.shape
    if not geometry.slot_tiles:  # a narrow layer may have residual planes and no salient column
        return torch.zeros(planes, geometry.row_tiles * TILE_ROWS, 0, dtype=torch.int32, device=residual_sign.device)
    bits = _unpack_bytes(residual_sign)[..., : place.numel()]
    slots = bits.new_zeros(planes, geometry.row_tiles * TILE_ROWS, geometry.slot_tiles * TILE_COLUMNS)
    slots[:, :rows, place] = bits
    return _pack_bytes(slots).view(torch.int32)


def _pack_bytes(bits: Tensor) -> Tensor:
    """0/1 uint8 [..., columns] to bytes, column 8 b + i in bit i of byte b."""
    bits = torch.nn.functional.pad(bits, (0, -bits.shape[-1] % 8))
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits.unflatten(-1, (-1, 8)) << shifts).sum(-1, dtype=torch.uint8)


def _unpack_bytes(packed: Tensor) -> Tensor:
    """Inverse of `_pack_bytes`, padding included: uint8 [..., 8 · bytes]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[..., None] >> shifts) & 1).flatten(-2)


def _global_index(residual_index: Tensor, place: Tensor, geometry: Geometry) -> Tensor:
    index = torch.full((geometry.slot_tiles * TILE_COLUMNS,), -1, dtype=torch.int32, device=place.device)
    block = place // (geometry.slots_per_block * SLOT)
    index[place] = (residual_index.long() + block * geometry.block_size).to(torch.int32)
    back = torch.full((geometry.column_tiles * TILE_COLUMNS,), -1, dtype=torch.int32, device=place.device)
    # clamped for tensors that are not filled yet (`nn.Module.to_empty`)
    back[index[place].long().clamp(0, len(back) - 1)] = place.to(torch.int32)
    return torch.cat([index, back])


def _tile_words(words: Tensor, row_tiles: int) -> Tensor:
    """int32 [planes, 32 · row tiles, 4 · tiles] to [row tiles, tiles, planes, 128], bits in lane order."""
    planes, _, count = words.shape
    # [row tiles, tiles, planes, g, r, word of the row]
    source = words.view(planes, row_tiles, 4, 8, count // _WORDS, _WORDS).permute(1, 4, 0, 3, 2, 5)
    tiles = torch.zeros(*source.shape[:4], _WORDS, 4, dtype=torch.int32, device=words.device)  # g, q, r
    for q in range(4):
        for s in range(4):
            for i in range(4):
                tiles[..., q, :] |= ((source[..., s] >> (4 * q + i)) & _PAIR) << (4 * i + s)
    return tiles.flatten(3)


def _untile_words(tiles: Tensor) -> Tensor:
    """Inverse of `_tile_words`: int32 [planes, 32 · row tiles, 4 · tiles]."""
    row_tiles, count, planes, _ = tiles.shape
    lanes = tiles.view(row_tiles, count, planes, 8, 4, 4)  # g, q, r
    words = torch.zeros(row_tiles, count, planes, 8, 4, _WORDS, dtype=torch.int32, device=tiles.device)  # g, r, s
    for q in range(4):
        for s in range(4):
            for i in range(4):
                words[..., s] |= ((lanes[..., q, :] >> (4 * i + s)) & _PAIR) << (4 * q + i)
    return words.permute(2, 0, 4, 3, 1, 5).reshape(planes, row_tiles * TILE_ROWS, count * _WORDS)


def _tile_coded_words(words: Tensor, row_tiles: int) -> Tensor:
    """`_tile_words` of a coded layer: words stay whole."""
    planes, _, count = words.shape
    words = torch.cat([words[:1], _unshuffled(words[1:])])
    # [row tiles, tiles, planes, g, q, r]
    return words.view(planes, row_tiles, 4, 8, count // _WORDS, _WORDS).permute(1, 4, 0, 3, 5, 2).flatten(3)


def _untile_coded_words(tiles: Tensor) -> Tensor:
    """Inverse of `_tile_coded_words`."""
    row_tiles, count, planes, _ = tiles.shape
    lanes = tiles.view(row_tiles, count, planes, 8, 4, 4)  # g, q, r
    words = lanes.permute(2, 0, 5, 3, 1, 4).reshape(planes, row_tiles * TILE_ROWS, count * _WORDS)
    return torch.cat([words[:1], _shuffled(words[1:])])


_SWAPS = ((0x22222222, 1), (0x0C0C0C0C, 2), (0x00F000F0, 4), (0x0000FF00, 8))  # the middle two quarters of 4, 8, … bits


def _unshuffled(words: Tensor) -> Tensor:
    """Even bits of every word in its lower half, odd ones in the upper one."""
    for mask, distance in _SWAPS:
        words = _swapped(words, mask, distance)
    return words


def _shuffled(words: Tensor) -> Tensor:
    """Inverse of `_unshuffled`."""
    for mask, distance in reversed(_SWAPS):
        words = _swapped(words, mask, distance)
    return words


def _swapped(words: Tensor, mask: int, distance: int) -> Tensor:
    """The bits of the mask in the place of those so much higher, and the other way round."""
    change = (words ^ (words >> distance)) & mask
    return words ^ change ^ (change << distance)
