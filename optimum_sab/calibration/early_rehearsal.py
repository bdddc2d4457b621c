"""The rehearsal before a weight is read: the model's own forward, as far as it can be judged without its weights.

The forward runs twice at most with packed layers and twice with dense ones, with different stand-ins. What fails with
packed layers and not with dense ones is the packed layers' doing. What fails with dense ones, in the same words
whatever stands in, is the sample's or the installation's. Everything else is left to the rehearsal of the loaded model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from optimum_sab.calibration.rehearsal import (
    one_of_each_kind,
    packed_in_place,
    random_state_kept,
    refusal_up_to,
)
from optimum_sab.calibration.stand_ins import PLAIN, VARIED, UnjudgedError, standing_in
from optimum_sab.calibration.streams.modes import reading
from optimum_sab.calibration.streams.observation import Observation, told
from optimum_sab.calibration.streams.patching import patched_forwards
from optimum_sab.calibration.streams.placement import map_tensors
from optimum_sab.calibration.streams.targets import decoder_targets
from optimum_sab.errors import CalibrationError
from optimum_sab.nn.selection import Selection

_TOKENS = 16  # that packed layers compute: a 7B block of 300 takes seconds on one core


def rehearse_unloaded(
    model: nn.Module, selection: Selection, sample: Mapping[str, Any], elsewhere: bool = False
) -> bool:
    """One sample goes through the model up to the last block of a new kind; the first of every kind is packed.

    The model, its generators and everything in it are as before afterwards.

    Args:
        model: dense, on meta.
        selection: what is to be binarized.
        sample: forward keyword arguments.
        elsewhere: whether the loaded model will compute on another device than the CPU. Then what a dense model cannot
            do here is only held against the sample where no device can do it.

    Returns:
        Whether the forward was seen to work. If not, it cannot be judged before the weights are there.

    Raises:
        CalibrationError: the loaded model cannot compute with packed layers, or does not read the sample.
    """
    own = {name: each.detach().clone() if isinstance(each, Tensor) else each for name, each in sample.items()}
    sample = map_tensors(own, torch.device("cpu"))
    refused: list[CalibrationError] = []
    with random_state_kept():
        for values in (PLAIN, VARIED):
            try:
                with standing_in(model, values), reading(model):  # reading puts one mode back for all
                    found = _tried(model, selection, sample)
            except UnjudgedError:
                return False
            if found is None:
                return True
            refused.append(found)
    causes = [each.__cause__ for each in refused]
    alike = len({str(each) for each in refused}) == 1 and all(_tells(each, elsewhere) for each in causes)
    if alike:
        raise refused[0]
    return False


def _tried(model: nn.Module, selection: Selection, sample: Mapping[str, Any]) -> CalibrationError | None:
    """What a dense model refuses; None where packed layers compute.

    Raises:
        CalibrationError: a dense model computes, and a packed one does not.
        UnjudgedError: they do not find room.
    """
    refused = _packed(model, selection, sample)
    if refused is None:
        return None
    seen, blocks = Observation(), one_of_each_kind(decoder_targets(model, selection))
    linears = {name: each for block in blocks for name, each in block.linears.items()}
    dense = seen.forward(partial(refusal_up_to, model, blocks, sample, ()), {}, linears)
    if dense is not None:
        return dense
    left = seen.unfit(list(selection.settings), selection.blocks)
    others = selection.without({name for names in left.values() for name in names})
    if not others.settings:
        raise CalibrationError(f"nothing is left to binarize in {type(model).__name__}: {told(left)}")
    if len(others.settings) < len(selection.settings):  # these stay dense, which is said when the model is loaded
        refused = _packed(model, others, sample)
    if refused is None:
        return None
    if _no_room(refused.__cause__):
        raise UnjudgedError
    raise refused


def _packed(model: nn.Module, selection: Selection, sample: Mapping[str, Any]) -> CalibrationError | None:
    blocks = one_of_each_kind(decoder_targets(model, selection))
    with packed_in_place(model, blocks, selection.settings, None) as packed:
        layers = [model.get_submodule(name) for name in packed]
        with patched_forwards({each: partial(_on_first_tokens, each.forward) for each in layers}):
            return refusal_up_to(model, blocks, sample, packed)


def _on_first_tokens(own: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What a packed layer gives for the first tokens; the others get zeros, as they would from a new model."""
    rows = x.flatten(0, -2) if x.dim() > 1 else x[None]
    y = own(rows[:_TOKENS])
    rest = y.new_zeros(rows.shape[0] - y.shape[0], y.shape[1])
    return torch.cat([y, rest]).view(*x.shape[:-1], y.shape[1])


def _no_room(cause: BaseException | None) -> bool:
    return isinstance(cause, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(cause)


def _tells(cause: BaseException | None, elsewhere: bool) -> bool:
    """Whether what a dense model raised holds for the loaded model, too."""
    if elsewhere:
        return isinstance(cause, (TypeError, ImportError))
    return not _no_room(cause) and "meta" not in str(cause)
