"""Binarize many small weights: each from its own statistics, several at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING

import torch

from optimum_sab.core.code import NO_CODE
from optimum_sab.core.columns import IN_TORCH, ColumnLoops
from optimum_sab.core.fitting import fit_planes
from optimum_sab.core.hessian import InputStatistics
from optimum_sab.core.problem import Problem
from optimum_sab.core.settings import LayerSettings
from optimum_sab.core.solver import Prepared, Solution, finish, prepare, solve
from optimum_sab.errors import CalibrationError, ConfigError, SABError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def solve_many(
    weights: Float[Tensor, "experts out in"] | Sequence[Float[Tensor, "out in"]],
    statistics: Sequence[InputStatistics],
    settings: LayerSettings,
    names: Sequence[str],
    loops: ColumnLoops = IN_TORCH,
    room: int | None = None,
) -> list[Solution]:
    """Binarize weights of one shape, such as the experts of a block.

    Without ``room`` each gets what `solve` finds on one thread, bit for bit. On a CPU as many weights are solved at
    once as torch has threads, each on one thread, so that no thread waits for another in the middle of a product and
    the results do not depend on the number of threads. A weight and its statistics are looked up when its turn comes
    and let go afterwards: memory is bounded by what so many single solves need, whatever the number of weights.

    With ``room``, as on an accelerator, where a solve is thousands of small launches, `stack_size` weights are fitted
    at once. Each is prepared and judged by itself (magnitude, α, damping, target, error), and what it finds is what
    `solve` finds but for the order in which products sum, so that levels that are as near may be chosen otherwise, and
    errors differ by that. With a code, whose search decides for every weight how long to go on, weights are solved one
    after the other.

    Args:
        weights: W of every expert, of one shape, any float dtypes.
        statistics: of their inputs; may be made as they are asked for.
        settings: of all of them.
        names: the modules' names, for messages.
        loops: what goes from column to column.
        room: bytes that may be taken of the device's memory to fit several at once; None fits each by itself.

    Raises:
        ConfigError: there are not as many weights as statistics and names, or their shapes differ.
        CalibrationError, ConfigError: as `solve`; the message names the expert. Of several that fail the first counts.
    """
    if not len(weights) == len(statistics) == len(names):
        raise ConfigError(
            f"{len(weights)} weights, {len(statistics)} statistics and {len(names)} names are given to be solved "
            "together; give one of each for every weight."
        )
    for weight, name in zip(weights, names, strict=True):
        if weight.shape != weights[0].shape or weight.ndim != 2:
            raise ConfigError(
                f"the weight of {name} is {list(weight.shape)} and that of {names[0]} is {list(weights[0].shape)}; "
                "only matrices of one shape are solved together."
            )

    if not len(names):
        return []
    held = {0: statistics[0]}  # looked up once

    def given(index: int) -> InputStatistics:
        own = held.pop(index) if index in held else statistics[index]
        width, has = weights[index].shape[1], own.hessian.shape[0]
        if has != width:
            raise CalibrationError(f"{names[index]} has {width} inputs and was given the statistics of {has}.")
        return replace(own)  # a copy, with which its factors go: those of all are waiting

    def one(index: int) -> Solution:
        return solve(weights[index], given(index), settings, names[index], loops)

    def prepared(index: int) -> Prepared:
        return prepare(weights[index], given(index), settings, names[index])

    total, (out, width) = len(names), weights[0].shape
    size = 1 if room is None or settings.code != NO_CODE else stack_size(out, width, settings, room)
    if size > 1:
        stacks = [range(start, min(start + size, total)) for start in range(0, total, size)]
        return [solution for some in stacks for solution in _solve_stack(prepared, some, settings, loops)]
    on_cpu = held[0].hessian.device.type == "cpu"
    workers = min(torch.get_num_threads(), total) if on_cpu else 1
    return [one(i) for i in range(total)] if workers == 1 else _at_once(one, total, workers)


def stack_size(out: int, width: int, settings: LayerSettings, room: int) -> int:
    """How many weights are fitted at once: a power of two, so that a little more or less memory rarely changes it.

    Args:
        out, width: of each weight.
        settings: of all of them.
        room: bytes that may be taken; half of them are counted on, since what is counted is about what it takes.
    """
    # H, H damped and U; T, T H, signs, what is left of T or the basis of a refit, and a block's scratch
    each = 4 * (3 * width**2 + (2 * settings.planes + 11) * out * width)
    return 1 << max(0, (room // 2 // each).bit_length() - 1)


def _solve_stack(
    prepared: Callable[[int], Prepared], indices: range, settings: LayerSettings, loops: ColumnLoops
) -> list[Solution]:
    """Those of some indices, each prepared by itself, all fitted together."""
    waiting: list[Prepared] = []
    stack: Problem | None = None
    failure: SABError | None = None
    for index in indices:
        try:
            each = prepared(index)
        except SABError as error:
            failure = error  # those before it may fail yet, and would count
            break
        if stack is None:
            stack = each.problem.empty_stack(len(indices))
        stack.put(len(waiting), each.problem)
        waiting.append(replace(each, problem=stack.of(len(waiting))))  # its own memory is let go
    found: list[Solution] = []
    if stack is not None:
        fit = fit_planes(stack.first(len(waiting)), settings, loops)
        found = [finish(each, fit.of(index), settings) for index, each in enumerate(waiting)]
    if failure is not None:
        raise failure
    return found


def _at_once(one: Callable[[int], Solution], total: int, workers: int) -> list[Solution]:
    """``one`` of every index, by threads that use one thread of torch each."""
    found: list[Solution | None] = [None] * total
    failed: dict[int, BaseException] = {}
    turns, lock = count(), threading.Lock()
    inference = torch.is_inference_mode_enabled()  # is of a thread

    def work() -> None:
        torch.set_num_threads(1)
        with torch.inference_mode(inference), torch.no_grad():
            while True:
                with lock:
                    index = total if failed else next(turns)
                if index >= total:
                    return
                try:
                    found[index] = one(index)
                except BaseException as error:
                    failed[index] = error  # all before it have begun; the first of them is raised

    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers, "solve") as pool:
            for each in [pool.submit(work) for _ in range(workers)]:
                each.result()
    finally:
        torch.set_num_threads(before)  # new threads begin with what was set last, by any
    if failed:
        raise failed[min(failed)]
    return [each for each in found if each is not None]
