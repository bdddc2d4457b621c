"""Where the linears that are binarized are: the decoder blocks that hold them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from optimum_sab.errors import CalibrationError, NonFiniteError
from optimum_sab.nn.decoder import find_decoder_blocks
from optimum_sab.nn.selection import Selection


@dataclass(frozen=True)
class DecoderTargets:
    """The decoder blocks that hold selected linears.

    Attributes:
        positions: of the blocks in the decoder.
        blocks: themselves.
        linears: of each block, by dotted name.
    """

    positions: list[int]
    blocks: list[nn.Module]
    linears: list[dict[str, nn.Linear]]


def decoder_targets(model: nn.Module, selection: Selection) -> DecoderTargets:
    """Where the selected linears are.

    Raises:
        CalibrationError: a selected module is no `nn.Linear`.
    """
    decoder = find_decoder_blocks(model)
    targets = DecoderTargets([], [], [])
    for index, block in enumerate(decoder.blocks):
        start = f"{decoder.prefix}.{index}." if decoder.prefix else f"{index}."
        inside = {name: target_linear(model, name) for name in selection.settings if name.startswith(start)}
        if inside:
            targets.positions.append(index)
            targets.blocks.append(block)
            targets.linears.append(inside)
    return targets


def target_linear(model: nn.Module, name: str) -> nn.Linear:
    """The linear of a dotted name.

    Raises:
        CalibrationError: it is another module.
    """
    module = model.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise CalibrationError(f"{name} is a {type(module).__name__}; only nn.Linear can be binarized.")
    return module


def refuse_offloaded(model: nn.Module, selection: Selection) -> None:
    """Every target weight must be there.

    Raises:
        CalibrationError: one is on meta.
    """
    for name in selection.settings:
        if target_linear(model, name).weight.device.type == "meta":
            raise CalibrationError(
                f"the weight of {name} is offloaded; load the model on the CPU for binarization (device_map='cpu') and "
                "name the accelerator in SABConfig(calibration_device=...)."
            )


def check_weights(model: nn.Module, selection: Selection) -> None:
    """Stop before hours of work: every target weight must be real and finite.

    Raises:
        CalibrationError: see `refuse_offloaded`.
        NonFiniteError: one holds NaN or inf.
    """
    refuse_offloaded(model, selection)
    for name in selection.settings:
        if not bool(torch.isfinite(target_linear(model, name).weight).all()):
            raise NonFiniteError(
                f"the weight of {name} holds NaN or inf; the checkpoint is damaged, or overflowed in float16."
            )
