"""What experts give in the quantized stream, and what they would be given if all tokens came to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from optimum_sab.calibration.streams.arrival import DENSE, Worker
from optimum_sab.calibration.streams.experts import ExpertLinears, RoutedInputs


class ExpertCalls:
    """Calls of the experts of one block.

    Args:
        weights: that were found, by dotted name; those of linears that are solved come in as they are.
        every_token: experts are shown all tokens, whichever are routed to them.
    """

    def __init__(self, weights: Mapping[str, Tensor], every_token: bool) -> None:
        self._weights = weights
        self._every_token = every_token
        self._hidden: dict[tuple[Worker, int], tuple[ExpertLinears, Tensor]] = {}  # what a module's experts got first

    def shown(self, linears: ExpertLinears, worker: Worker, given: RoutedInputs) -> RoutedInputs:
        """What the visitor is shown of a call."""
        return replace(given, every=self._every(linears, worker, given.inputs)) if self._every_token else given

    def output(self, linears: ExpertLinears, given: RoutedInputs) -> Tensor:
        """What the linears give in the quantized stream, [pairs, out]."""
        return linears.module.each(linears.name, given.inputs, given.routing, partial(self._through, linears))

    def _through(self, linears: ExpertLinears, expert: int, rows: Tensor) -> Tensor:
        linear, name = linears.module.linear(expert, linears.name), linears.names.get(expert)
        found: Tensor = linear(rows) if name is None else nn.functional.linear(rows, self._weights[name], linear.bias)
        return found

    def _every(self, linears: ExpertLinears, worker: Worker, inputs: Tensor) -> Callable[[int], Tensor] | None:
        """None where it is not known what a token gives."""
        module = linears.module
        if linears.first:
            self._hidden[worker, id(module)] = linears, inputs
            return lambda expert: inputs
        if (worker, id(module)) not in self._hidden:
            return None
        before, hidden = self._hidden.pop((worker, id(module)))

        def rows(expert: int) -> Tensor:
            if worker[1] == DENSE:
                found: Tensor = module.linear(expert, before.name)(hidden)
            else:
                found = self._through(before, expert, hidden)
            return module.between(found)

        return rows
