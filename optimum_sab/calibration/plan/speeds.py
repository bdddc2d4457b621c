"""How fast this machine is at what a run is made of: a few representative products and one small real `solve`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from optimum_sab.calibration.plan import operations
from optimum_sab.calibration.plan.workload import LinearGroup, Workload
from optimum_sab.calibration.predictions.divergence import divergence
from optimum_sab.core.hessian import InputMoments, accumulate_hessian, factor_hessian
from optimum_sab.core.parts import watched_by
from optimum_sab.core.settings import LayerSettings
from optimum_sab.core.solver import solve
from optimum_sab.format.random_weight import random_packed
from optimum_sab.nn.linear import SABLinear
from optimum_sab.ops.columns import column_loops

ENOUGH = 0.15  # seconds for which a product is repeated
PATIENCE = 6.0  # seconds of wall time from which on nothing is repeated more than once
WIDEST, TALLEST = 1024, 512  # of what is solved and multiplied on trial
SOLVES = 3  # tries; the first meets cold caches
LARGEST = 4096  # of a product of a forward
MOST_PRODUCTS = 8
HIDDEN = 32
HEAD = 64  # features of a head of attention
ROWS = 256  # of an input, at the most
VOCABULARY = 16384
MEGABYTES = 64


@dataclass(frozen=True)
class Speeds:
    """Operations per second, as `operations` counts them.

    Attributes:
        device: where it was measured.
        shape: [out, in] of the packed products and of the `solve`.
        dense_shapes: [out, in] of the dense products.
        forward: products with a weight in the model's dtype, of as many rows as a sample has tokens.
        one_row: the same of a single row, and of a weight too large for caches: a token that is written.
        packed: products with a packed weight.
        packed_row: the same of a single row.
        moments: second moments in fp32.
        factorization: of a Hessian.
        attention: of a sample's tokens to each other.
        elementwise: numbers of hidden states of a sample that are multiplied with others, per second.
        predictions: logits whose divergence is taken, per second.
        reading: bytes in memory that are looked at, per second.
        solving: of every part of a `solve`.
        seconds: that all this took.
    """

    device: str
    shape: tuple[int, int]
    dense_shapes: tuple[tuple[int, ...], ...]
    forward: float
    one_row: float
    packed: float
    packed_row: float
    moments: float
    factorization: float
    attention: float
    elementwise: float
    predictions: float
    reading: float
    solving: Mapping[str, float]
    seconds: float


def measure_speeds(work: Workload) -> Speeds:
    """Time a few things, at most about ten seconds.

    Args:
        work: whose shapes, dtype, settings and device are taken.
    """
    started = time.perf_counter()
    device = work.options.device or torch.device(work.home)
    group = max(work.model.groups, key=lambda each: each.weights)
    n = min(WIDEST, max(each.in_features for each in work.model.groups))
    out = min(TALLEST, group.out_features)
    rows = max(1, min(ROWS, work.samples.total // max(1, len(work.samples.tokens))))
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    dtype = work.model.dtype
    products = [(drawn(o, i, dtype=dtype), drawn(rows, i, dtype=dtype)) for o, i in _shapes(work)]
    heads = drawn(1, n // HEAD or 1, rows, min(HEAD, n), dtype=dtype)
    hidden = [drawn(rows, work.model.width, dtype=dtype) for _ in range(HIDDEN)]  # more than a cache holds
    x, one = drawn(rows, n, dtype=dtype), drawn(1, n, dtype=dtype)
    large = torch.ones(MEGABYTES * 2**20 // (n * dtype.itemsize), n, dtype=dtype, device=device)
    packed = SABLinear.from_packed(random_packed(out, n, group.settings, device=device)).to(device)
    timed = _Timer(device)
    product = 2.0 * out * n
    gram = operations.hessian(2.0 * n, n, device.type == "cpu")
    with torch.no_grad():
        inputs, hessian = drawn(2 * n, n), torch.zeros(n, n, device=device)
        many, other = drawn(32, VOCABULARY), drawn(32, VOCABULARY)
        block = torch.ones(MEGABYTES * 2**20 // 4, device=device)
        square = inputs.T @ inputs / n
        solving = _solving(drawn, group, (out, n), work.two_streams, timed)
        return Speeds(
            str(device),
            (out, n),
            tuple(tuple(weight.shape) for weight, _ in products),
            forward=timed.rate(
                lambda: [linear(x, weight) for weight, x in products],
                rows * 2.0 * sum(weight.numel() for weight, _ in products),
            ),
            one_row=timed.rate(lambda: linear(one, large), 2.0 * large.numel()),
            packed=timed.rate(lambda: packed(x), rows * product),
            packed_row=timed.rate(lambda: packed(one), product),
            moments=timed.rate(lambda: accumulate_hessian(hessian, inputs), gram),
            factorization=timed.rate(lambda: factor_hessian(square, 0.1), operations.factorization(n)),
            attention=timed.rate(lambda: scaled_dot_product_attention(heads, heads, heads), 4.0 * rows * heads.numel()),
            elementwise=timed.rate(lambda: [each * each for each in hidden], float(HIDDEN * hidden[0].numel())),
            predictions=timed.rate(lambda: divergence(many, other), float(many.numel())),
            reading=timed.rate(lambda: torch.isfinite(block).all(), float(block.nbytes)),
            solving=solving,
            seconds=time.perf_counter() - started,
        )


def _shapes(work: Workload) -> list[tuple[int, int]]:
    """Of the linears in a block, each once for every other of its kind; none larger than `LARGEST`."""
    block = max(work.model.blocks, key=lambda each: each.computed)
    found: list[tuple[int, int]] = []
    for group in block.groups:
        shape = min(LARGEST, group.out_features // group.members), min(LARGEST, group.in_features)
        if not group.expert or shape not in found:
            found += [shape] * (1 if group.expert else group.members)
    return found[:MOST_PRODUCTS]


def _solving(
    drawn: Callable[..., Tensor], group: LinearGroup, shape: tuple[int, int], two_streams: bool, timed: _Timer
) -> dict[str, float]:
    """Operations per second of each part of a real `solve` with the run's settings."""
    out, n = shape
    weight = drawn(out, n)
    seconds = _solve_seconds(drawn, weight, group.settings, two_streams, timed)
    counts = operations.solving(out, n, group.settings, two_streams)
    return {name: counts[name] / seconds[name] for name in counts if counts[name] and seconds.get(name)}


def _solve_seconds(
    drawn: Callable[..., Tensor], weight: Tensor, settings: LayerSettings, two_streams: bool, timed: _Timer
) -> dict[str, float]:
    out, n = weight.shape
    halves = [InputMoments(n, weight.device, two_streams, "a trial") for _ in range(2)]
    for half in halves:
        x = drawn(n, n)
        if two_streams:
            half.add("text", x, x + 0.1 * drawn(n, n), 0.1 * drawn(n, out))
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
            solve(weight, statistics, settings, "a trial", column_loops(weight.device))
        for name, found in watch.seconds.items():
            least[name] = min(found, least.get(name, found))
        statistics._factored.clear()
    return least


@dataclass
class _Watch:
    """Adds up the seconds of parts, without those inside of them."""

    timed: _Timer
    seconds: dict[str, float] = field(default_factory=dict)
    _open: list[str] = field(default_factory=list)
    _since: float = 0.0

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
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now


class _Timer:
    """Time on a device, the least of several tries: what else runs on the machine makes it longer, never shorter.

    On a CPU it is the processor time of this thread, which takes its share of every product and waits for the others,
    so that a busy machine is measured as if it were idle.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begun = time.perf_counter()

    @property
    def late(self) -> bool:
        """Whether patience is at its end."""
        return time.perf_counter() - self._begun > PATIENCE

    def now(self) -> float:
        if self._device.type == "cpu":
            return time.thread_time()
        torch.accelerator.synchronize(self._device)
        return time.perf_counter()

    def rate(self, run: Callable[[], object], count: float) -> float:
        """Of ``count`` operations in a run, per second."""
        begun = self.now()
        run()
        first = self.now() - begun
        if first > ENOUGH:
            return count / first
        least, spent = float("inf"), 0.0  # the first met cold caches
        while not spent or (spent < ENOUGH and not self.late):
            started = self.now()
            run()
            taken = self.now() - started
            least, spent = min(least, taken), spent + taken
        return count / max(least, 1e-9)
