"""A small real `solve` and a factorization, timed: what the seconds of larger ones are told from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from optimum_sab.calibration.plan import operations
from optimum_sab.calibration.plan.timer import Clocks, Timer
from optimum_sab.core.factorization import WIDE, factor_hessian
from optimum_sab.core.hessian import InputMoments
from optimum_sab.core.parts import part, watched_by
from optimum_sab.core.settings import LayerSettings
from optimum_sab.core.solver import solve
from optimum_sab.format.packed_weight import PackedWeight
from optimum_sab.ops.columns import column_loops

SOLVES = 3  # tries; the first meets cold caches
MOST_ENTRIES = 0.5  # of the time of a factorization
LEAST = 32  # rows and columns of what is hardly any work


@dataclass(frozen=True)
class SolvingSpeeds:
    """Of a `solve`.

    Attributes:
        parts: operations per second of every part.
        experts: the same of experts, of which a CPU solves one a thread.
        least: seconds of one of next to nothing.
    """

    parts: Mapping[str, float]
    experts: Mapping[str, float]
    least: float


def time_factorization(hessian: Tensor, timed: Timer) -> tuple[float, float]:
    """Operations per second and seconds an entry, by two widths: most of the time of a narrow one is no product.

    Two widths tell two unknowns apart only as well as either was timed: of a narrow one at most `MOST_ENTRIES` is taken
    for entries, or a disturbed trial would leave next to no time for the products of wide ones.
    """

    def seconds(square: Tensor) -> float:
        def once() -> float:
            return 1.0 / timed.rate(lambda: factor_hessian(square, 0.1), 1.0)

        threads = torch.get_num_threads()
        if not timed.on_cpu or threads == 1:
            return once()
        together = once()
        torch.set_num_threads(1)
        try:
            return min(together, once())  # several threads of a busy machine wait for each other
        finally:
            torch.set_num_threads(threads)

    n = len(hessian)
    half, whole = n // 2, operations.factorization(n)
    taken = seconds(hessian)
    if half < WIDE:  # which is another way to factor it
        return whole / taken, 0.0
    narrow, less = seconds(hessian[:half, :half].contiguous()), operations.factorization(half)
    # whole / speed + n² entry = taken; less / speed + half² entry = narrow
    entry = max(0.0, (narrow * whole - taken * less) / (half**2 * whole - n**2 * less))
    entry = min(entry, MOST_ENTRIES * min(narrow / half**2, taken / n**2))
    return whole / (taken - n**2 * entry), entry


def time_solving(
    drawn: Callable[..., Tensor], settings: LayerSettings, shape: tuple[int, int], two_streams: bool, timed: Timer
) -> SolvingSpeeds:
    """Of a real `solve`: by itself, beside others, and with hardly anything to compute."""
    counts = operations.solving(*shape, settings, two_streams)

    def speeds() -> dict[str, float]:
        seconds = _solve_seconds(drawn, drawn(*shape), settings, two_streams, timed)
        return {name: counts[name] / seconds[name] for name in counts if counts[name] and seconds.get(name)}

    together, threads = speeds(), torch.get_num_threads()
    alone = together
    if timed.on_cpu and threads > 1:
        torch.set_num_threads(1)
        try:
            alone = speeds()
        finally:
            torch.set_num_threads(threads)
    least = sum(_solve_seconds(drawn, drawn(LEAST, LEAST), settings, two_streams, timed).values())
    # several threads of a busy machine wait for each other, and are not slower than one on a quiet one
    parts = {name: max(found, alone.get(name, 0.0)) for name, found in together.items()}
    beside = {name: (threads if timed.on_cpu else 1) * found for name, found in alone.items()}
    return SolvingSpeeds(parts, beside, least)


def _solve_seconds(
    drawn: Callable[..., Tensor], weight: Tensor, settings: LayerSettings, two_streams: bool, timed: Timer
) -> dict[str, float]:
    out, n = weight.shape
    halves = [InputMoments(n, weight.device, two_streams, "a trial") for _ in range(2)]
    for half in halves:
        x = drawn(n, n)
        if two_streams:  # apart by what both halves show, so that there is something to correct
            half.add("text", x, 1.1 * x + 0.1 * drawn(n, n), 0.1 * drawn(n, out))
        else:
            half.add("text", x)
    by_modality = settings.significance == "modality"
    least: dict[str, float] = {}
    statistics = halves[1].statistics(part=halves[0] if two_streams else None, by_modality=by_modality)
    for tries in range(SOLVES):
        if tries and timed.late:
            break
        watch = _Watch(timed)
        with watched_by(watch):
            solution = solve(weight, statistics, settings, "a trial", column_loops(weight.device))
            with part("packing"):
                PackedWeight.pack(solution.planes, settings).dequantize()
        for name, found in watch.seconds.items():
            least[name] = min(found, least.get(name, found))
        statistics._factored.clear()
    return least


@dataclass
class _Watch:
    """Adds up the seconds of parts, without those inside of them."""

    timed: Timer
    seconds: dict[str, float] = field(default_factory=dict)
    _open: list[str] = field(default_factory=list)
    _since: Clocks = (0.0, 0.0)

    def enter(self, name: str) -> None:
        self._account()
        self._open.append(name)

    def leave(self) -> None:
        self._account()
        self._open.pop()

    def _account(self) -> None:
        now = self.timed.now()
        if self._open:
            name = self._open[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + self.timed.between(self._since, now)
        self._since = now
