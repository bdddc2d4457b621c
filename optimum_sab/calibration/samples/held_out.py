"""Samples that are to judge a model, without those that calibrate it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from optimum_sab.calibration.samples.forward_inputs import token_ids
from optimum_sab.errors import SampleError, warn


def held_out(
    evaluation: Sequence[Mapping[str, Any]], calibration: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """The evaluation samples that do not calibrate, with a warning where that is not all of them.

    Args:
        evaluation: forward arguments.
        calibration: forward arguments of what calibrates.

    Raises:
        SampleError: all of them calibrate.
    """
    by_tokens: dict[bytes, list[Mapping[str, Any]]] = {}
    for each in calibration:
        by_tokens.setdefault(_tokens(each), []).append(each)
    left = [each for each in evaluation if not any(_same(each, other) for other in by_tokens.get(_tokens(each), ()))]
    if evaluation and not left:
        raise SampleError(
            f"all {len(evaluation)} evaluation samples calibrate too, on which every model looks better than it is; "
            "hold some rows back, and give them as evaluation alone."
        )
    if len(left) < len(evaluation):
        warn(
            f"of the {len(evaluation)} evaluation samples {len(evaluation) - len(left)} calibrate too and are left out "
            "of the comparison, since every model looks better on those than it is."
        )
    return left


def _tokens(sample: Mapping[str, Any]) -> bytes:
    ids = token_ids(sample)
    return b"" if ids is None else ids.cpu().contiguous().numpy().tobytes()


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one.keys() == other.keys() and all(_equal(one[name], other[name]) for name in one)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    return bool(type(one) is type(other) and not isinstance(one, Tensor) and one == other)
