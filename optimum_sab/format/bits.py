"""Signs to bits and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Bool, UInt8
    from torch import Tensor


def pack_bits(signs: Bool[Tensor, "*rows columns"], multiple: int = 1) -> UInt8[Tensor, "*rows bytes"]:
    """Column ``8 b + i`` becomes bit i of byte b; padding bits up to ``multiple`` bytes are 0."""
    width = signs.shape[-1]
    missing = -width % (8 * multiple)
    padded = torch.nn.functional.pad(signs, (0, missing)) if missing else signs
    groups = padded.reshape(*signs.shape[:-1], -1, 8).to(torch.uint8)
    shifts = torch.arange(8, dtype=torch.uint8, device=signs.device)
    return (groups << shifts).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: UInt8[Tensor, "*rows bytes"], columns: int) -> Bool[Tensor, "*rows columns"]:
    """Inverse of `pack_bits`; padding is dropped."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed[..., None] >> shifts) & 1
    return bits.flatten(-2)[..., :columns].bool()
