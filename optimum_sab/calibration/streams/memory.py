"""What activations and statistics take, what is free, and giving back what is not used."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn

from optimum_sab.calibration.samples.forward_inputs import token_count
from optimum_sab.core.factorization import WIDE
from optimum_sab.nn.selection import Selection

# [in, in] in fp32 that solving holds at its most. With a dense stream: with a drift of that size beside every Hessian,
# and without (statistics/gathering.py), where two modalities in two halves of the samples, or the solver's five, are
# the most. With one stream, sums of two modalities, or the solver's: a Hessian, damped, and what factors it
MATRICES, FEW_MATRICES = 9, 6
OWN_MATRICES, FEW_OWN_MATRICES = 5, 4


def matrices(in_features: int, out_features: int, streams: int) -> int:
    """How many matrices [in, in] in fp32 solving a linear, or a stack of them, holds at its most.

    Args:
        in_features, out_features: of all of them together.
        streams: 2 where a dense stream runs beside the quantized one, else 1.
    """
    wide = in_features >= WIDE
    if streams == 1:
        return FEW_OWN_MATRICES if wide else OWN_MATRICES
    return FEW_MATRICES if wide and in_features > 2 * out_features else MATRICES


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had on a device; None where that cannot be asked."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # PyTorch's own, to use again
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    if device.type != "cpu":
        return None
    try:
        import psutil  # comes with accelerate
    except ImportError:
        return None
    return int(psutil.virtual_memory().available)


def give_back_heap(in_features: int, device: torch.device) -> None:
    """Let the system have what was freed, before a linear this wide is solved on the CPU.

    glibc keeps freed pieces of up to 32 MB that lie between others in use as the process's own: over the blocks of a
    13B-shaped model they grew to half a gigabyte. Does nothing for narrow linears, or with another C library.
    """
    if device.type == "cpu" and in_features >= WIDE:
        give_back_freed()


def give_back_freed() -> None:
    """Let the system have what was freed and glibc keeps; does nothing with another C library."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def solving_room(device: torch.device) -> int | None:
    """Bytes that solving many weights at once may take on an accelerator; None on a CPU, where each has a thread."""
    return None if device.type == "cpu" else free_memory(device)


def activation_bytes(tokens: int, streams: int, width: int, widest: int, dtype: torch.dtype) -> int:
    """About what the activations of all samples take, in bytes.

    Between two groups of linears every token of every stream holds the input of the widest linear, and its hidden state
    four times: as the block was given it, behind the attention, normalized, and what its last product is added to.

    Args:
        tokens: of all samples.
        streams: 2 where a dense stream runs beside the quantized one, else 1.
        width: features of a hidden state.
        widest: features of the widest linear's input.
        dtype: of the activations.
    """
    return tokens * streams * (widest + 4 * width) * dtype.itemsize


def held_activations(
    model: nn.Module, selection: Selection, samples: Sequence[Mapping[str, Any]], two_streams: bool
) -> int:
    """`activation_bytes` of a run.

    Args:
        model: dense.
        selection: the linears that will be binarized.
        samples: forward keyword arguments, one dict per sample.
        two_streams: whether a dense stream will run beside the quantized one.
    """
    widths = _widths(model, selection)
    return activation_bytes(sum(map(token_count, samples)), 1 + two_streams, *widths) if widths else 0


def _widths(model: nn.Module, selection: Selection) -> tuple[int, int, torch.dtype] | None:
    """Features of a hidden state and of the widest input, and the dtype of both; None without dense linears."""
    linears = [model.get_submodule(name) for name in selection.settings]
    widths = [linear.in_features for linear in linears if isinstance(linear, nn.Linear)]
    return (widths[0], max(widths), next(linears[0].parameters()).dtype) if widths else None
