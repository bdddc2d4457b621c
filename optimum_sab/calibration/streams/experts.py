"""Experts in the lockstep: the linears of one name wait together, whichever tokens each is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from optimum_sab.calibration.streams.arrival import DENSE, Arrival
from optimum_sab.nn.experts import SABExperts
from optimum_sab.nn.routing import Routing


@dataclass(frozen=True)
class ExpertLinears:
    """The selected linears of one name of a block's experts; what is given to one is the rows of its tokens.

    Attributes:
        key: by which it is known while coroutines wait.
        module: all experts.
        name: of the linears.
        names: dotted names of the selected ones by expert.
    """

    key: str
    module: SABExperts
    name: str
    names: Mapping[int, str]

    @property
    def first(self) -> bool:
        """Whether their rows are the tokens themselves, whoever goes where."""
        return self.name == self.module.layout.matrices[0] and len(self.module.layout.arguments) > 1


@dataclass(frozen=True)
class RoutedInputs:
    """What one coroutine brings to `ExpertLinears`.

    Attributes:
        inputs: x, [tokens, in] or [pairs, in].
        routing: which rows go where.
        every: what an expert would be given if all tokens came to it, [tokens, in]; None where only routed ones count.
    """

    inputs: Tensor
    routing: Routing
    every: Callable[[int], Tensor] | None = None


@dataclass(frozen=True)
class RoutedArrival:
    """One coroutine waiting at `ExpertLinears`; otherwise as `Arrival`.

    Attributes:
        sample, stream: whose.
        given: what it brings.
        entered: rows of hidden states that the block was called with.
        company: samples that came to the block.
    """

    sample: int
    stream: str
    given: RoutedInputs
    entered: int
    company: int

    def at(self, expert: int, every: bool) -> Arrival:
        """What comes to one expert.

        Args:
            expert: which.
            every: whether all tokens do, whose rows are the inputs.
        """
        if every or self.given.every is not None:
            rows = self.given.inputs if self.given.every is None else self.given.every(expert)
            return self._arrival(rows, torch.arange(rows.shape[0], device=rows.device))
        routing = self.given.routing
        [here] = torch.where(routing.experts == expert)
        return self._arrival(self.given.inputs[here // routing.repeats(self.given.inputs)], routing.token[here])

    def pooled(self, linears: ExpertLinears) -> Arrival:
        """What comes to any expert, each row once: a token, or a token at an expert."""
        routing, inputs = self.given.routing, self.given.inputs
        if linears.first:
            return self._arrival(inputs, torch.arange(inputs.shape[0], device=inputs.device))
        count = len(linears.module)
        [here] = torch.where((routing.experts >= 0) & (routing.experts < count))
        tokens = routing.token[here]
        return self._arrival(inputs[here], tokens, tokens * count + routing.experts[here])

    def _arrival(self, rows: Tensor, tokens: Tensor, keys: Tensor | None = None) -> Arrival:
        return Arrival(self.sample, self.stream, rows, None, self.entered, self.company, tokens, keys)


def expert_linears(block: nn.Module, start: str, selected: Mapping[str, nn.Linear]) -> list[ExpertLinears]:
    """The `ExpertLinears` of a block, in order.

    Args:
        block: the module.
        start: its dotted name.
        selected: its target linears by dotted name.
    """
    found = []
    for path, module in block.named_modules():
        if isinstance(module, SABExperts):
            above = f"{start}.{path}" if path else start
            for name in module.layout.matrices:
                every = {expert: f"{above}.{expert}.{name}" for expert in range(len(module))}
                names = {expert: each for expert, each in every.items() if each in selected}
                if names:
                    found.append(ExpertLinears(f"{above}.*.{name}", module, name, names))
    return found


def arrivals_by_expert(
    linears: ExpertLinears, arrivals: Sequence[RoutedArrival]
) -> Iterator[tuple[str, list[Arrival]]]:
    """The selected linears by dotted name, and who comes there with rows; nobody, where no token does.

    The dense stream brings all its tokens where they are the linears' rows, since it may have routed others.
    """
    for expert, name in linears.names.items():
        here = [each.at(expert, linears.first and each.stream == DENSE) for each in arrivals]
        routed = {each.sample for each in here if each.rows and each.stream != DENSE}
        yield name, [each for each in here if each.sample in routed and (each.rows or each.stream == DENSE)]


def pooled_arrivals(linears: ExpertLinears, arrivals: Sequence[RoutedArrival]) -> list[Arrival]:
    """What comes to any of the experts."""
    return [each.pooled(linears) for each in arrivals]
