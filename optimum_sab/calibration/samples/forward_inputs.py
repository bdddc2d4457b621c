"""Arguments of the model's forward that are prepared already: a processor's output, a trainer's tokenized rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor

from optimum_sab.calibration.samples.modality import token_ids
from optimum_sab.errors import SampleError

IDS = ("input_ids", "decoder_input_ids")
PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
_OF_TRAINING = (
    *("labels", "special_tokens_mask", "offset_mapping", "overflow_to_sample_mapping", "length"),
    *("assistant_masks", "completion_mask", "loss_mask", "prompt_mask", "seq_lengths", "num_items_in_batch"),
)


def read_inputs(row: Mapping[str, Any], label: str) -> tuple[dict[str, Any], list[str]]:
    """One sample's forward arguments as tensors, and the names of what is none.

    Args:
        row: tensors, arrays or lists, with ``input_ids`` of one sample, [tokens] or [1, tokens]; a model whose encoder
            reads pictures only takes ``decoder_input_ids`` instead.
        label: names the sample in errors.

    Raises:
        SampleError: it is a batch of several, empty, or the entries do not have a number for every token.
    """
    inputs: dict[str, Tensor] = {}
    others = []
    for name, value in row.items():
        if name in _OF_TRAINING or _is_remark(value):
            others.append(name)
        else:
            inputs[name] = _tensor(value, name, label)
    for own in IDS:
        if own in row:
            inputs[own] = _ids(inputs.get(own), own, label)
    if "input_ids" not in inputs:
        return inputs, others
    ids = inputs["input_ids"]
    for name in PER_TOKEN:
        if name in inputs:
            inputs[name] = inputs[name][None] if inputs[name].ndim == 1 else inputs[name]
        if name in inputs and inputs[name].shape != ids.shape:
            raise SampleError(
                f"{label}: {name!r} has the shape {list(inputs[name].shape)}, and 'input_ids' {list(ids.shape)}; they "
                "must be the same."
            )
    return _without_padding(inputs), others


def is_prepared(sample: Any) -> TypeGuard[Mapping[str, Any]]:
    """Whether a sample that was read is one of `read_inputs`."""
    return isinstance(sample, Mapping) and any(name in sample for name in IDS)


def token_count(inputs: Mapping[str, Any]) -> int:
    """Tokens of a sample's inputs (`token_ids`)."""
    ids = token_ids(inputs)
    return 0 if ids is None else int(ids.numel())


def _ids(ids: Tensor | None, name: str, label: str) -> Tensor:
    if ids is None or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise SampleError(f"{label}: {name!r} must be whole numbers, a list or a tensor.")
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.ndim != 2 or ids.shape[0] != 1:
        raise SampleError(
            f"{label}: {name!r} has the shape {list(ids.shape)}; a sample is one row, [1, tokens]: give the rows "
            "of a batch one by one."
        )
    return ids.long()


def _is_remark(value: Any) -> bool:
    """Whether a column says something about the sample and is no input: a text, a number, texts, structures."""
    if isinstance(value, (list, tuple)):
        return all(_is_remark(each) and not isinstance(each, (int, float)) for each in value)
    return isinstance(value, (str, bytes, int, float, Mapping))


def _tensor(value: Any, name: str, label: str) -> Tensor:
    if isinstance(value, Tensor):
        if value.is_meta:
            raise SampleError(
                f"{label}: {name!r} is on the device meta, where tensors have no values; give it with them."
            )
        return value
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:  # lists of different lengths, objects
        raise SampleError(f"{label}: {name!r} cannot be made a tensor: {error}") from error


def _without_padding(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Nothing may be learnt from padding, and one sample needs none."""
    mask, length = inputs.get("attention_mask"), inputs["input_ids"].shape[1]
    if mask is None or bool(mask.all()):
        return inputs
    kept = mask[0] != 0
    return {
        name: value[:, kept]
        if value.ndim >= 2 and value.shape[:2] == (1, length) and not value.is_floating_point()
        else value
        for name, value in inputs.items()
    }
