"""Forward arguments of a sample with more tokens, with fewer, and in a batch with others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def extend_inputs(inputs: Mapping[str, Any], tokens: Sequence[int]) -> dict[str, Any]:
    """A sample's inputs with tokens of text appended; every other per-token input goes on as at its last token."""
    length = inputs["input_ids"].shape[-1]
    added = torch.tensor([list(tokens)], dtype=torch.int64)
    extended: dict[str, Any] = {}
    for name, value in inputs.items():
        if name == "input_ids":
            value = torch.cat([value, added.to(value.device)], dim=1)
        elif _per_token(value, length):
            value = torch.cat([value, value[:, -1:].expand(-1, len(tokens), *value.shape[2:])], dim=1)
        extended[name] = value
    return extended


def cut_inputs(inputs: Mapping[str, Any], length: int) -> dict[str, Any]:
    """A sample's inputs with at most ``length`` tokens; for samples without pictures."""
    tokens = inputs["input_ids"].shape[-1]
    return {name: value[:, :length] if _per_token(value, tokens) else value for name, value in inputs.items()}


def stacking_key(inputs: Mapping[str, Any], index: int) -> tuple[Any, ...]:
    """Samples with equal ones can be stacked; what is no tensor, or has no first dimension, stays alone.

    Args:
        inputs: forward arguments of one sample.
        index: the sample's, which tells it from all others where it cannot be stacked.
    """
    length = inputs["input_ids"].shape[-1]
    parts: list[Any] = []
    for name, value in sorted(inputs.items()):
        if not isinstance(value, Tensor) or value.ndim == 0:
            parts.append((name, index))
        elif _per_token(value, length):
            parts.append((name, "token", value.dtype, *value.shape[2:]))
        else:
            parts.append((name, value.dtype, *value.shape[1:]))
    return tuple(parts)


def stack_inputs(samples: Sequence[Mapping[str, Any]], padding: int) -> dict[str, Any]:
    """One batch of samples with one `stacking_key`: per-token inputs padded on the left, pictures one after the other.

    Args:
        samples: forward arguments of one sample each.
        padding: token id that fills the shorter ones.
    """
    lengths = [sample["input_ids"].shape[-1] for sample in samples]
    longest = max(lengths)
    stacked: dict[str, Any] = {}
    for name, first in samples[0].items():
        values = [sample[name] for sample in samples]
        if _per_token(first, lengths[0]):
            rows = [
                torch.cat([v.new_full((1, longest - n, *v.shape[2:]), padding if name == "input_ids" else 0), v], dim=1)
                for v, n in zip(values, lengths, strict=True)
            ]
            stacked[name] = torch.cat(rows)
        elif len(values) > 1:
            stacked[name] = torch.cat(values)
        else:
            stacked[name] = first
    if "attention_mask" not in stacked:
        mask = torch.arange(longest)[None] >= longest - torch.tensor(lengths)[:, None]
        stacked["attention_mask"] = mask.long()
    return stacked


def _per_token(value: Any, length: int) -> bool:
    """Whether an input has an entry for every token: ids, masks and types, which are integers; pictures are floats."""
    if not isinstance(value, Tensor) or value.is_floating_point():
        return False
    return value.ndim >= 2 and value.shape[:2] == (1, length)
