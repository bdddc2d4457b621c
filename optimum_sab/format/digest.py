"""The digest of a stored tensor: what notices a bit that is another than when the tensor was saved."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

PAGE = 4096  # bytes of a row of words: a disk's and a memory's unit, so damage is often within one
SHORT = 65536  # bytes up to which a tensor is hashed as it is
_PAGES_AT_ONCE = 256  # stay in the cache between the two sums

Array: TypeAlias = np.ndarray[Any, Any]


def digest(tensor: Tensor) -> str:
    """`digest_of_bytes` of a tensor of any dtype and shape, on any device but meta."""
    plain = tensor.detach().cpu().contiguous()
    content = plain.reshape(-1).view(torch.uint8).numpy() if plain.numel() else np.zeros(0, np.uint8)
    return digest_of_bytes(str(plain.dtype).removeprefix("torch."), plain.shape, content)


def digest_of_bytes(dtype: str, shape: Sequence[int], content: Array) -> str:
    """Sixteen hexadecimal digits for dtype, shape and content, read at the speed of memory.

    They are the first 64 bits of a SHA-256 over ``int32[1,8,3]`` in ASCII and then the content, if it has at most
    65,536 bytes. Of a longer one two kinds of sums follow in its place, modulo 2⁶⁴: filled up with zeros, it is seen as
    little-endian 64-bit words in rows of 512, and the sums of all rows and of all columns are taken. Both change with
    every flipped bit, and with whatever else happens within one row; words or rows in another order change one of them.
    What would pass are four words at the corners of a rectangle whose changes cancel, or one case in 2⁶⁴. It is no
    signature: it stands beside the data, and whoever may write one may write the other.

    Args:
        dtype: PyTorch's name for it, such as ``int32``.
        shape: of the tensor.
        content: uint8 [bytes], as safetensors stores them.
    """
    found = hashlib.sha256(f"{dtype}[{','.join(map(str, shape))}]".encode("ascii"))
    if len(content) <= SHORT:
        found.update(content.tobytes())
        return found.hexdigest()[:16]
    whole = len(content) - len(content) % PAGE
    rows, columns = _sums(content[:whole])
    if whole < len(content):
        rest = np.zeros(PAGE, np.uint8)
        rest[: len(content) - whole] = content[whole:]
        last, more = _sums(rest)
        rows, columns = np.concatenate([rows, last]), columns + more
    found.update(rows.tobytes())
    found.update(columns.tobytes())
    return found.hexdigest()[:16]


def _sums(content: Array) -> tuple[Array, Array]:
    """Of whole pages: the sums of the rows, and of the columns."""
    words = content.view("<u8").reshape(-1, PAGE // 8)
    rows, columns = np.zeros(len(words), "<u8"), np.zeros(PAGE // 8, "<u8")
    for start in range(0, len(words), _PAGES_AT_ONCE):
        part = words[start : start + _PAGES_AT_ONCE]
        np.sum(part, 1, out=rows[start : start + _PAGES_AT_ONCE])
        columns += part.sum(0)
    return rows, columns
