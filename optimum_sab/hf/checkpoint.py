"""Check a packed checkpoint's files against the model before anything is loaded from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from optimum_sab.errors import FormatError
from optimum_sab.format.layout import tensor_specs
from optimum_sab.nn.linear import SABLinear

_DTYPES = {torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"}
_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
_MARKS = ("row_scale", "col_scale", "residual_sign")  # tensors that only a packed layer has


def local_files(name_or_path: str) -> list[str]:
    """The safetensors files of a local checkpoint folder; empty when it is not a folder."""
    folder = Path(name_or_path) if name_or_path else None
    return sorted(str(p) for p in folder.glob("*.safetensors")) if folder is not None and folder.is_dir() else []


def check_files(model: nn.Module, prefix: str, files: Sequence[str]) -> None:
    """Every packed layer of ``model`` must have all its tensors in the files, in the right shape and dtype.

    Only headers are read. Layers are matched by their name from the decoder's block list on, because Transformers may
    store a model under another prefix than it has in memory.

    Args:
        model: the skeleton, `SABLinear` in place.
        prefix: dotted name of the decoder's block list.
        files: safetensors files.

    Raises:
        FormatError: a file is truncated, or a tensor is missing or misshapen.
    """
    stored = stored_tensors(files)
    packed_stems: dict[str, list[str]] = {}
    for key in stored:
        stem, _, tensor = key.rpartition(".")
        if tensor in _MARKS:
            packed_stems.setdefault(_from_blocks(stem, prefix), []).append(stem)
    for name, module in model.named_modules():
        if not isinstance(module, SABLinear):
            continue
        stems = packed_stems.get(_from_blocks(name, prefix))
        if not stems:
            raise FormatError(
                f"{name}: no packed tensors in the checkpoint; it is incomplete, or its quantization_config does not "
                "belong to it."
            )
        for tensor, spec in tensor_specs(module.out_features, module.in_features, module.settings).items():
            found = stored.get(f"{stems[0]}.{tensor}")
            if found is None:
                raise FormatError(
                    f"{name}: tensor {tensor!r} is missing; the checkpoint is incomplete, fetch it again."
                )
            if (found.shape, found.dtype) != (spec.shape, _DTYPES[spec.dtype]):
                raise FormatError(
                    f"{name}: tensor {tensor!r} is {found.dtype} {found.shape}, expected {_DTYPES[spec.dtype]} "
                    f"{spec.shape}; the checkpoint and its quantization_config do not belong together."
                )


def _from_blocks(name: str, prefix: str) -> str:
    """The name from the block list's last part on: ``layers.0.mlp.up_proj``."""
    last = prefix.rpartition(".")[2]
    parts = name.split(".")
    return ".".join(parts[parts.index(last) :]) if last in parts else name


@dataclass(frozen=True)
class StoredTensor:
    """Header entry of one tensor: its shape, and its dtype in safetensors' spelling."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


def stored_tensors(files: Sequence[str]) -> dict[str, StoredTensor]:
    """Every tensor in the files, from their headers.

    Raises:
        FormatError: a file is truncated or damaged.
    """
    stored: dict[str, StoredTensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                opened: Any = handle
                for key in opened.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                    entry = opened.get_slice(key)
                    stored[key] = StoredTensor(tuple(entry.get_shape()), entry.get_dtype())
        except (SafetensorError, OSError) as error:
            raise FormatError(
                f"{file} cannot be read ({error}); it is truncated or damaged, fetch it again."
            ) from error
    return stored
