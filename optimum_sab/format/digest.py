"""The digest of a stored tensor: what notices a bit that is another than when the tensor was saved."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor


def digest(tensor: Tensor) -> str:
    """CRC-32 of dtype, shape and content, as eight hexadecimal digits.

    The checksum runs over ``int32[1,8,3]`` in ASCII and then over the bytes as safetensors stores them. It notices
    every single flipped bit, every run of wrong bits up to 32 long, and anything else but for one case in 2³². It is not
    cryptographic: it stands beside the data, so whoever may change one may change the other.

    Args:
        tensor: any dtype and shape, on any device but meta.
    """
    plain = tensor.detach().cpu().contiguous()
    kind = f"{str(plain.dtype).removeprefix('torch.')}[{','.join(map(str, plain.shape))}]"
    start = zlib.crc32(kind.encode("ascii"))
    content: Any = plain.reshape(-1).view(torch.uint8).numpy() if plain.numel() else b""
    return f"{zlib.crc32(content, start):08x}"
