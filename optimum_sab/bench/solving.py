"""Seconds and memory of solving experts: one after the other through `solve`, and together through `solve_many`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from optimum_sab.bench.conditions import Conditions
from optimum_sab.bench.environment import Environment, describe_environment
from optimum_sab.bench.parts import forget_peak, peak_memory
from optimum_sab.bench.shapes import ExpertsShape
from optimum_sab.bench.verification import WrongResultError
from optimum_sab.calibration.streams.memory import solving_room
from optimum_sab.core.columns import ColumnLoops
from optimum_sab.core.hessian import InputMoments, InputStatistics
from optimum_sab.core.many import solve_many
from optimum_sab.core.solver import Solution, solve
from optimum_sab.errors import ConfigError
from optimum_sab.ops.columns import column_loops

DISTINCT = 4  # experts with inputs of their own; what comes after takes theirs in turn
SCALE = 0.02  # of weights, and of what the streams differ by in the residual
DRIFT = 0.4  # of the inputs, between the streams
AGREEMENT = 0.01  # of an expert's error: rounding takes other signs where two are as good


@dataclass(frozen=True)
class Use:
    """What solving took.

    Attributes:
        seconds: an expert, median over the turns.
        cpu_seconds: the same of all threads of the process; on a busy machine it says more.
        peak_memory_bytes: the most in use meanwhile, what is solved included: allocated by torch on CUDA, resident on
            the CPU. 0 where the system does not tell.
    """

    seconds: float
    cpu_seconds: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class Agreement:
    """How far two ways to solve the same experts found the same.

    Attributes:
        bit_for_bit: whether all that they found is equal.
        differing_signs: share of the base planes' signs that differ.
        error_difference: the largest difference between an expert's two errors, relative to the first.
    """

    bit_for_bit: bool
    differing_signs: float
    error_difference: float


@dataclass(frozen=True)
class SolvingTiming:
    """One matrix of every expert.

    Attributes:
        name: where the shape comes from, and which matrix.
        out_features, in_features: of each.
        experts: how many were solved.
        one_by_one: through `solve`.
        together: through `solve_many`.
        speedup: how many times as fast they are together.
        agreement: of what both found.
        error: relative output error, mean over the experts.
    """

    name: str
    out_features: int
    in_features: int
    experts: int
    one_by_one: Use
    together: Use
    speedup: float
    agreement: Agreement
    error: float


@dataclass(frozen=True)
class SolvingReport:
    """All rows of one run, and where it ran."""

    environment: Environment
    rows: tuple[SolvingTiming, ...]

    def as_json(self) -> dict[str, Any]:
        """Everything, JSON-ready."""
        return asdict(self)


@dataclass(frozen=True)
class _Matrix:
    """One of an expert's matrices."""

    name: str
    out_features: int
    in_features: int


def compare_solving(
    shapes: Sequence[ExpertsShape],
    experts: int,
    tokens: int,
    conditions: Conditions,
    on_row: Callable[[SolvingTiming], None] | None = None,
) -> SolvingReport:
    """Solve the matrices of random experts both ways, in turns in one run, after one expert that is not timed.

    Inputs are correlated, of magnitudes that lie two powers of ten apart, in two streams with residual, half of the
    tokens in either half of the samples.

    Args:
        shapes: whose experts; gate and up are one matrix.
        experts: how many of them.
        tokens: that each gets.
        conditions: ``dtype`` is of the weights, ``repeats`` counts turns; statistics are fp32.
        on_row: is given every row as soon as it is there.

    Raises:
        ConfigError: there are fewer than two tokens, or a count is below 1.
        WrongResultError: an expert's errors of the two ways are further apart than `AGREEMENT`.
    """
    for option, value, least in (("experts", experts, 1), ("tokens", tokens, 2), ("repeats", conditions.repeats, 1)):
        if value < least:
            raise ConfigError(f"--{option} {value} must be at least {least}.")
    environment = describe_environment(conditions.device)
    rows: list[SolvingTiming] = []
    for shape in shapes:
        for matrix in (
            _Matrix(f"{shape.name} gate/up", 2 * shape.intermediate, shape.hidden),
            _Matrix(f"{shape.name} down", shape.hidden, shape.intermediate),
        ):
            rows.append(_measure(matrix, random_experts(matrix, experts, tokens, conditions), conditions))
            if on_row is not None:
                on_row(rows[-1])
    return SolvingReport(environment, tuple(rows))


@dataclass(frozen=True)
class RandomExperts:
    """What is solved.

    Attributes:
        weights: W [out, in] of each.
        statistics: of the inputs of each.
    """

    weights: list[Tensor]
    statistics: list[InputStatistics]

    def first(self, count: int) -> RandomExperts:
        """Some of them."""
        return RandomExperts(self.weights[:count], self.statistics[:count])

    def unfactored(self) -> RandomExperts:
        """The same, each with statistics of its own of which nothing is factored yet."""
        return RandomExperts(self.weights, [replace(given) for given in self.statistics])

    def one_by_one(self, conditions: Conditions, loops: ColumnLoops) -> list[Solution]:
        """Each by itself."""
        pairs = zip(self.weights, self.statistics, strict=True)
        return [solve(weight, given, conditions.settings, loops=loops) for weight, given in pairs]

    def together(self, conditions: Conditions, loops: ColumnLoops) -> list[Solution]:
        """All of them as a block's are."""
        names = [f"experts.{expert}" for expert in range(len(self.weights))]
        room = solving_room(conditions.device)
        return solve_many(self.weights, self.statistics, conditions.settings, names, loops, room)


def random_experts(matrix: _Matrix, experts: int, tokens: int, conditions: Conditions) -> RandomExperts:
    """Random weights, and statistics of random tokens.

    Args:
        matrix: of each expert.
        experts: how many.
        tokens: of each; `DISTINCT` experts have their own.
        conditions: of which device, dtype and seed count.
    """
    device, (out, width) = conditions.device, (matrix.out_features, matrix.in_features)
    generator = torch.Generator(device).manual_seed(conditions.seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device, generator=generator)

    mix = normal(width, width) / width**0.5
    spread = torch.logspace(0, -2, width, device=device)[torch.randperm(width, device=device, generator=generator)]
    given = []
    for _ in range(min(experts, DISTINCT)):
        halves = [InputMoments(width, device, True, matrix.name) for _ in range(2)]
        for half, count in zip(halves, (tokens // 2, tokens - tokens // 2), strict=True):
            dense = (normal(count, width) * spread) @ mix
            quantized = dense + DRIFT * (normal(count, width) * spread) @ mix
            half.add("text", quantized, dense, SCALE * normal(count, out))
        given.append(halves[1].statistics(part=halves[0], by_modality=conditions.settings.significance == "modality"))
    weights = [(normal(out, width) * SCALE).to(conditions.dtype) for _ in range(experts)]
    return RandomExperts(weights, [given[expert % len(given)] for expert in range(experts)])


@dataclass
class _Turns:
    """What the turns of one way took, and what it found in the last."""

    way: Callable[[RandomExperts], list[Solution]]
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peak: int = 0
    found: list[Solution] = field(default_factory=list)

    def turn(self, experts: RandomExperts, device: torch.device) -> None:
        self.found = []
        forget_peak(device)
        began = _clocks(device)
        self.found = self.way(experts)
        ended = _clocks(device)
        self.seconds.append(ended[0] - began[0])
        self.cpu_seconds.append(ended[1] - began[1])
        self.peak = max(self.peak, peak_memory(device))

    def use(self) -> Use:
        seconds, cpu = (statistics.median(each) / len(self.found) for each in (self.seconds, self.cpu_seconds))
        return Use(seconds, cpu, self.peak)


def _measure(matrix: _Matrix, experts: RandomExperts, conditions: Conditions) -> SolvingTiming:
    loops = column_loops(conditions.device)
    one_by_one, together = (
        _Turns(partial(way, conditions=conditions, loops=loops))
        for way in (RandomExperts.one_by_one, RandomExperts.together)
    )
    for turns in (one_by_one, together):
        turns.way(experts.first(1))  # compiles what has not been compiled
    for _ in range(conditions.repeats):
        for turns in (one_by_one, together):
            turns.turn(experts.unfactored(), conditions.device)
    first, second = one_by_one.use(), together.use()
    return SolvingTiming(
        matrix.name,
        matrix.out_features,
        matrix.in_features,
        len(experts.weights),
        first,
        second,
        speedup=first.seconds / second.seconds,
        agreement=agreement(one_by_one.found, together.found, matrix.name),
        error=statistics.fmean(each.error for each in together.found),
    )


def _clocks(device: torch.device) -> tuple[float, float]:
    """Seconds of the clock and of the process, all work of the device done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter(), time.process_time()


def agreement(one: Sequence[Solution], other: Sequence[Solution], name: str) -> Agreement:
    """Compare what two ways found of the same experts.

    Args:
        one, other: of every expert.
        name: of the matrix, for messages.

    Raises:
        WrongResultError: an expert's errors are further apart than `AGREEMENT`.
    """
    pairs = list(zip(one, other, strict=True))
    apart = [abs(theirs.error - ours.error) / ours.error if ours.error else theirs.error for ours, theirs in pairs]
    worst = max(range(len(pairs)), key=apart.__getitem__)
    if not apart[worst] <= AGREEMENT:
        raise WrongResultError(
            f"expert {worst} of {name} has an error of {one[worst].error:.6g} solved by itself and of "
            f"{other[worst].error:.6g} solved with others; a time would mean nothing. Please report this with the "
            "output of `optimum-sab env`."
        )
    differ = [float((ours.planes.base_sign != theirs.planes.base_sign).float().mean()) for ours, theirs in pairs]
    return Agreement(all(_equal(*pair) for pair in pairs), statistics.fmean(differ), apart[worst])


def _equal(one: Solution, other: Solution) -> bool:
    fields = zip(vars(one.planes).values(), vars(other.planes).values(), strict=True)
    return one.error == other.error and all(
        torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs for ours, theirs in fields
    )
