"""One forward of the loaded model with packed layers of random content: what cannot compute shows before the work."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from optimum_sab.calibration.streams.modes import without_cache
from optimum_sab.calibration.streams.patching import patched_forwards
from optimum_sab.calibration.streams.targets import DecoderTargets
from optimum_sab.core.settings import LayerSettings
from optimum_sab.errors import CalibrationError, StreamError
from optimum_sab.format.random_weight import random_packed
from optimum_sab.nn.linear import SABLinear
from optimum_sab.nn.modules import set_module
from optimum_sab.nn.preparation import prepare_layers


@dataclass(frozen=True)
class Rehearsed:
    """A decoder block whose linears are tried.

    Attributes:
        block: the block.
        linears: its selected linears by dotted name.
    """

    block: nn.Module
    linears: Mapping[str, nn.Linear]


def one_of_each_kind(targets: DecoderTargets) -> list[Rehearsed]:
    """The first block of every kind: of its class, and with its linears."""
    kinds: dict[Any, Rehearsed] = {}
    for block, linears in zip(targets.blocks, targets.linears, strict=True):
        inside = {id(module): name for name, module in block.named_modules()}
        kinds.setdefault((type(block), tuple(inside[id(each)] for each in linears.values())), Rehearsed(block, linears))
    return list(kinds.values())


@contextmanager
def packed_in_place(
    model: nn.Module, blocks: Sequence[Rehearsed], settings: Mapping[str, LayerSettings], backend: str | None
) -> Iterator[list[str]]:
    """Inside, packed layers of random content stand where the linears are; outside, the linears do, untouched.

    Args:
        model: dense.
        blocks: whose linears are replaced.
        settings: of each linear, by dotted name.
        backend: what computes; None or "auto" leaves it to the device.

    Yields:
        The linears' names.
    """
    linears = {name: dense for each in blocks for name, dense in each.linears.items()}
    try:
        for name, dense in linears.items():
            packed = random_packed(dense.out_features, dense.in_features, settings[name], device=dense.weight.device)
            set_module(model, name, SABLinear.from_packed(packed, dense.bias).eval())
        for each in blocks:
            prepare_layers(each.block, backend)
        yield list(linears)
    finally:
        for name, dense in linears.items():
            set_module(model, name, dense)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Outside, the global generators go on as if nothing had been drawn inside."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def refusal(model: nn.Module, sample: Mapping[str, Any], packed: Sequence[str]) -> CalibrationError | None:
    """Run the model on a sample.

    Args:
        model: with packed layers in it, or dense.
        sample: forward keyword arguments.
        packed: names of the packed layers.

    Returns:
        Where the forward fails, an error with the module, what it raised and the remedy; else None.
    """
    kind = type(model).__name__
    try:
        with torch.no_grad():
            model(**sample, **without_cache(model))
    except StreamError:
        raise
    except torch.OutOfMemoryError as error:
        text = (
            f"one forward of {kind} with one sample does not find room ({_first_line(error)}); give shorter samples "
            "(sequence_length, or fewer pixels), or a device with more memory."
        )
        return _because(error, text)
    except Exception as error:  # whatever a model raises: it is told now, and not after the work
        where = _where(error, model)
        raised = f"{where or 'its forward'} raises {type(error).__name__}: {_first_line(error)}"
        if not packed:
            return _because(error, f"{kind} does not read a calibration sample: {raised}. Give samples that it reads.")
        concerned = [name for name in packed if f"{name}.".startswith(f"{where}.")] or list(packed)
        text = (
            f"{kind} does not compute with packed layers: {raised}. A packed layer's weight is int32 and no matrix, "
            "which a model must not read; leave the linears concerned dense, with "
            f"modules_to_not_convert={_without_block(concerned)}."
        )
        return _because(error, text)
    return None


class _Enough(BaseException):
    """All blocks that are tried have computed. No model catches it."""


def refusal_up_to(
    model: nn.Module, blocks: Sequence[Rehearsed], sample: Mapping[str, Any], packed: Sequence[str]
) -> CalibrationError | None:
    """`refusal` of a forward that ends behind the last of some blocks."""
    with _ending_behind([each.block for each in blocks]):
        try:
            return refusal(model, sample, packed)
        except _Enough:
            return None


@contextmanager
def _ending_behind(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """A forward ends when the last of these has computed."""
    waiting = set(blocks)

    def ending(block: nn.Module, own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            output = own(*args, **kwargs)
            waiting.discard(block)
            if not waiting:
                raise _Enough
            return output

        return forward

    with patched_forwards({block: ending(block, block.forward) for block in blocks}):
        yield


def _because(error: Exception, text: str) -> CalibrationError:
    refused = CalibrationError(text)
    refused.__cause__ = error
    return refused


def _where(error: BaseException, model: nn.Module) -> str:
    """Dotted name of the innermost module of the model in whose forward the error was raised; empty if in none."""
    names = {id(module): name for name, module in model.named_modules() if name}
    found, trace = "", error.__traceback__
    while trace is not None:
        found = names.get(id(trace.tb_frame.f_locals.get("self")), found)
        trace = trace.tb_next
    return found


def _without_block(names: Sequence[str]) -> list[str]:
    """The names from behind the block's number on, which hold in every block."""
    short = []
    for name in names:
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
        short.append(".".join(parts[number + 1 :]) or name)
    return list(dict.fromkeys(short))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
