"""Binarize many small weights: each from its own statistics, several at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import TYPE_CHECKING

import torch

from optimum_sab.core.columns import IN_TORCH, ColumnLoops
from optimum_sab.core.hessian import InputStatistics
from optimum_sab.core.settings import LayerSettings
from optimum_sab.core.solver import Solution, solve
from optimum_sab.errors import CalibrationError, ConfigError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def solve_many(
    weights: Float[Tensor, "experts out in"] | Sequence[Float[Tensor, "out in"]],
    statistics: Sequence[InputStatistics],
    settings: LayerSettings,
    names: Sequence[str],
    loops: ColumnLoops = IN_TORCH,
) -> list[Solution]:
    """Binarize weights of one shape, such as the experts of a block.

    Each gets what `solve` finds on one thread, bit for bit.

    On a CPU as many weights are solved at once as torch has threads, each on one thread, so that no thread waits for
    another in the middle of a product and the results do not depend on the number of threads. A weight and its
    statistics are looked up when its turn comes and let go afterwards: memory is bounded by what so many single solves
    need, whatever the number of weights.

    Args:
        weights: W of every expert, of one shape, any float dtypes.
        statistics: of their inputs; may be made as they are asked for.
        settings: of all of them.
        names: the modules' names, for messages.
        loops: what goes from column to column.

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

    def one(index: int) -> Solution:
        given = held.pop(index) if index in held else statistics[index]
        return _solve_one(weights[index], given, settings, names[index], loops)

    on_cpu = held[0].hessian.device.type == "cpu"
    workers = min(torch.get_num_threads(), len(names)) if on_cpu else 1
    return [one(i) for i in range(len(names))] if workers == 1 else _at_once(one, len(names), workers)


def _solve_one(
    weight: Tensor, given: InputStatistics, settings: LayerSettings, name: str, loops: ColumnLoops
) -> Solution:
    width, has = weight.shape[1], given.hessian.shape[0]
    if has != width:
        raise CalibrationError(f"{name} has {width} inputs and was given the statistics of {has}.")
    return solve(weight, given, settings, name, loops)


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
