"""Where the linears that are binarized are: the decoder blocks that hold them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from optimum_sab.core.magnitude import check_magnitude
from optimum_sab.errors import CalibrationError, NonFiniteError
from optimum_sab.nn.selection import Selection
from optimum_sab.nn.streamed import parameters_in_turn, streamed_blocks

_STEP = 2**24  # values that are looked at at a time


@dataclass(frozen=True)
class DecoderTargets:
    """The decoder blocks that hold selected linears.

    Attributes:
        names: of the blocks.
        blocks: themselves.
        linears: of each block, by dotted name.
    """

    names: list[str]
    blocks: list[nn.Module]
    linears: list[dict[str, nn.Linear]]


def decoder_targets(model: nn.Module, selection: Selection) -> DecoderTargets:
    """Where the selected linears are.

    Raises:
        CalibrationError: a selected module is no `nn.Linear`.
    """
    targets = DecoderTargets([], [], [])
    for block in selection.blocks:
        inside = {name: target_linear(model, name) for name in selection.settings if name.startswith(f"{block}.")}
        if inside:
            targets.names.append(block)
            targets.blocks.append(model.get_submodule(block))
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
    """Every target weight must be there, or come when its block is called.

    Raises:
        CalibrationError: one is on meta.
    """
    coming = tuple(f"{name}." for name in streamed_blocks(model))
    for name in selection.settings:
        if target_linear(model, name).weight.device.type == "meta" and not name.startswith(coming):
            raise CalibrationError(
                f"the weight of {name} is offloaded; load the model on the CPU for binarization (device_map='cpu') and "
                "name the accelerator in SABConfig(calibration_device=...), --calibration-device."
            )


def check_weights(
    model: nn.Module, selection: Selection, look: Callable[[str, nn.Parameter], None] | None = None
) -> None:
    """Stop before hours of work: every target weight must be real, finite and of a size that can be stored.

    Args:
        model: dense.
        selection: the linears that will be binarized.
        look: given every parameter with its name as well, so that none is read twice.

    Raises:
        CalibrationError: see `refuse_offloaded`.
        ConfigError: see `check_magnitude`.
        NonFiniteError: a parameter of the model holds NaN or inf.
    """
    refuse_offloaded(model, selection)
    targets = {f"{name}.weight": name for name in selection.settings}
    for name, parameter in parameters_in_turn(model):
        if name in targets:
            check_magnitude(parameter, selection.settings[targets[name]].row_scale, targets[name])
        elif parameter.is_floating_point() and parameter.device.type != "meta":
            _check_finite(name, parameter.detach())
        if look is not None:
            look(name, parameter)


def _check_finite(name: str, parameter: Tensor) -> None:
    if not all(bool(torch.isfinite(part).all()) for part in parameter.flatten().split(_STEP)):
        module, _, tensor = name.rpartition(".")
        raise NonFiniteError(
            f"the {tensor} of {module} holds NaN or inf; the checkpoint is damaged, or overflowed in float16: fetch it "
            "again, or load it with dtype=torch.bfloat16 or torch.float32."
        )
