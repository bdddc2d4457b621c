"""Parameters that cost nothing in the place of those that are not read yet, so that a forward can be tried."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from optimum_sab.calibration.streams.modes import modules_kept

_SPREAD = 0.02  # of varied values, as weights of language models have it


class UnjudgedError(Exception):
    """What a model does cannot be known without its weights."""


@dataclass(frozen=True)
class Values:
    """What stands in.

    Attributes:
        varied: whether every row of a matrix has a value of its own; otherwise matrices are 0, as gates and biases of a
            new model are, and vectors 1, as its norms are.
        dtype: of what is floating; None for the model's own.
    """

    varied: bool = False
    dtype: torch.dtype | None = None


PLAIN, VARIED = Values(), Values(varied=True, dtype=torch.float32)


@contextmanager
def standing_in(model: nn.Module, values: Values) -> Iterator[None]:
    """Inside, tensors on meta have stand-ins on the CPU, and linears cost next to nothing; outside, all is as it was.

    All matrices are one piece of memory, which is never written and therefore (`numpy.zeros`) never there, or rows of
    one value, stored once. Buffers are made as the model makes those that its checkpoint does not hold.

    Args:
        model: its class initializes buffers with ``initialize_weights``, as Transformers' do, where any is on meta.
        values: what stands in.

    Raises:
        UnjudgedError: the model does not make its buffers in this way, or there is no room.
    """
    with modules_kept(model):
        try:
            maker = _Maker(model, values)
            for module in model.modules():
                maker.replace(module)
            if maker.buffers:
                model.initialize_weights()  # type: ignore[operator]
        except Exception as error:  # a model's own code, written for whole models
            raise UnjudgedError from error
        yield


class _Maker:
    """Makes each stand-in once, as tied parameters are one."""

    def __init__(self, model: nn.Module, values: Values) -> None:
        waiting = [each for each in model.parameters() if each.is_meta]
        self._values = values
        self._made: dict[int, Any] = {}
        rows = max((each.shape[0] for each in waiting if each.dim()), default=0)
        self._rows = torch.randn(rows, generator=torch.Generator().manual_seed(0)) * _SPREAD
        largest = max((each.numel() * self._dtype(each).itemsize for each in waiting), default=0)
        self._zeros = torch.from_numpy(np.zeros(largest, np.uint8))
        self.buffers = 0

    def replace(self, module: nn.Module) -> None:
        """Put stand-ins into one module."""
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                module._parameters[name] = self._once(parameter, self._parameter)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = self._once(buffer, self._buffer)
                self.buffers += 1
        weight = module._parameters.get("weight")
        plain = type(module).forward is nn.Linear.forward
        if plain and weight is not None and hasattr(weight, _MARK):
            module.forward = partial(_cheaply, module, module.forward, self._values.varied)

    def _once(self, tensor: Tensor, make: Callable[[Tensor], Tensor]) -> Any:
        if id(tensor) not in self._made:
            self._made[id(tensor)] = make(tensor)
        return self._made[id(tensor)]

    def _parameter(self, tensor: Tensor) -> nn.Parameter:
        stand_in = nn.Parameter(self._content(tensor.shape, self._dtype(tensor)), requires_grad=False)
        setattr(stand_in, _MARK, True)
        return stand_in

    def _content(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        if self._values.varied and len(shape) in (1, 2):
            rows = self._rows[: shape[0]].to(dtype)
            return rows[:, None].expand(shape) if len(shape) == 2 else rows + 1
        if len(shape) < 2:
            return torch.ones(shape, dtype=dtype)
        return self._zeros[: shape.numel() * dtype.itemsize].view(dtype).view(shape)

    def _buffer(self, tensor: Tensor) -> Tensor:
        return torch.zeros(tensor.shape, dtype=self._dtype(tensor))

    def _dtype(self, tensor: Tensor) -> torch.dtype:
        return self._values.dtype or tensor.dtype if tensor.is_floating_point() else tensor.dtype


_MARK = "_is_hf_initialized"  # Transformers leaves alone what bears it


def _cheaply(linear: Any, own: Callable[[Tensor], Tensor], varied: bool, x: Tensor) -> Tensor:
    """The linear's output where every row of its weight is one value, so that one row stands for all."""
    weight, bias = linear.weight, linear.bias
    try:
        row: Tensor = nn.functional.linear(x, weight.new_ones(1, linear.in_features))
        if varied:
            y = row * weight[:, 0]
            return y if bias is None else y + bias
        return row.new_zeros(*row.shape[:-1], linear.out_features) if bias is None else _repeated(bias, row.shape[:-1])
    except Exception:  # what does not fit is told by the linear itself
        return own(x)


def _repeated(row: Tensor, shape: torch.Size) -> Tensor:
    return row.expand(*shape, -1).contiguous()
