"""NaN and inf in what stands beside packed layers; their own scales are `PackedWeight.validate`'s."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from optimum_sab.errors import FormatError
from optimum_sab.hf.shares import own_part
from optimum_sab.hf.stored_files import StoredFile


def check_finite(model: nn.Module, files: Sequence[StoredFile], missing: Collection[str] = ()) -> None:
    """No parameter may hold NaN or inf, no buffer NaN (masks hold inf).

    Args:
        model: loaded; where a tensor is offloaded, the files are read in its place.
        files: the checkpoint's.
        missing: names in the model that the checkpoint has not, so Transformers made something up.

    Raises:
        FormatError: names the first tensor that does.
    """
    buffers = {name for name, _ in model.named_buffers()}
    offloaded = False
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor) or tensor.is_meta:
            offloaded = True
            continue
        tensor = own_part(tensor)
        if bool(tensor.isnan().any()) if name in buffers else non_finite(tensor):
            if name in missing:
                raise FormatError(
                    f"{name} is missing, and what was made up in its place holds NaN or inf; the checkpoint is "
                    "incomplete, fetch it again."
                )
            half = "; or its values do not fit into float16, load it with another dtype"
            raise FormatError(
                f"{name} holds NaN or inf; the checkpoint is damaged, fetch it again"
                f"{half if tensor.dtype == torch.float16 else ''}."
            )
    for file in files if offloaded else ():
        with safe_open(file.path, framework="pt") as handle:
            opened: Any = handle
            for name, entry in file.tensors.items():
                if entry.is_floating and non_finite(opened.get_tensor(name)):
                    raise FormatError(f"{name} holds NaN or inf; the checkpoint is damaged, fetch it again.")


def non_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds NaN or inf; nothing of its size is made."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return False
    if tensor.element_size() == 1:  # torch has no reduction over float8
        tensor = tensor.float()
    low, high = torch.aminmax(tensor)
    return not bool(torch.isfinite(low) & torch.isfinite(high))
