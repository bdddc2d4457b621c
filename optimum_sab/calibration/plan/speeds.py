"""How fast this machine is at what a run is made of: a few representative products and a small real `solve`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from optimum_sab.calibration.allocation.ladder import ANCHORS, probed_settings
from optimum_sab.calibration.plan import operations
from optimum_sab.calibration.plan.timer import Timer
from optimum_sab.calibration.plan.trial import SolvingSpeeds, time_factorization, time_solving
from optimum_sab.calibration.plan.workload import Workload
from optimum_sab.calibration.predictions.divergence import divergence
from optimum_sab.core.code import NO_CODE
from optimum_sab.core.hessian import accumulate_hessian
from optimum_sab.core.settings import LayerSettings
from optimum_sab.format.random_weight import random_packed
from optimum_sab.nn.linear import SABLinear

WIDEST, TALLEST = 2048, 512  # of what is solved and multiplied on trial
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
        factorization: of a Hessian so wide that nearly all of it is products.
        factored_entry: seconds for every entry of a Hessian that is factored, which come on top.
        attention: of a sample's tokens to each other.
        elementwise: numbers of hidden states of a sample that are multiplied with others, per second.
        predictions: logits whose divergence is taken, per second.
        reading: bytes in memory that are looked at, per second.
        solving: of a `solve`, by whether its settings have a code.
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
    factored_entry: float
    attention: float
    elementwise: float
    predictions: float
    reading: float
    solving: Mapping[bool, SolvingSpeeds]
    seconds: float

    def factoring(self, n: int) -> float:
        """Seconds of factoring a Hessian of n inputs."""
        return operations.factorization(n) / self.factorization + n**2 * self.factored_entry

    def solve(self, counts: Mapping[str, float], settings: LayerSettings, expert: bool = False) -> float:
        """Seconds of a solve of so many operations, part by part.

        Args:
            counts: of `operations.solving`.
            settings: what it is solved with; a search counts other things than a plain fit, at another speed.
            expert: whether it is one of several that are solved at the same time.
        """
        met = self.solving[settings.code != NO_CODE]
        speeds = met.experts if expert else met.parts
        # what was not met on trial goes at the speed of second moments
        return met.least + sum(count / speeds.get(name, self.moments) for name, count in counts.items() if count)


def measure_speeds(work: Workload) -> Speeds:
    """Time a few things, at most about ten seconds.

    Args:
        work: whose shapes, dtype, settings and device are taken.
    """
    started = time.perf_counter()
    device = work.options.device or work.main
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
    timed = Timer(device)
    product = 2.0 * out * n
    gram = operations.hessian(float(n), n, device.type == "cpu")
    with torch.no_grad():
        inputs, hessian = drawn(n, n), torch.zeros(n, n, device=device)
        many, other = drawn(32, VOCABULARY), drawn(32, VOCABULARY)
        block = torch.ones(MEGABYTES * 2**20 // 4, device=device)
        factorization, entry = time_factorization(inputs.T @ inputs / n, timed)
        solving = {
            coded: time_solving(drawn, settings, (out, n), work.two_streams, timed)
            for coded, settings in _tried(work).items()
        }
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
            factorization=factorization,
            factored_entry=entry,
            attention=timed.rate(lambda: scaled_dot_product_attention(heads, heads, heads), 4.0 * rows * heads.numel()),
            elementwise=timed.rate(lambda: [each * each for each in hidden], float(HIDDEN * hidden[0].numel())),
            predictions=timed.rate(lambda: divergence(many, other), float(many.numel())),
            reading=timed.rate(lambda: torch.isfinite(block).all(), float(block.nbytes)),
            solving=solving,
            seconds=time.perf_counter() - started,
        )


def _tried(work: Workload) -> dict[bool, LayerSettings]:
    """Settings to solve with on trial, by whether they have a code: those of the largest group that has such."""
    found: dict[bool, LayerSettings] = {}
    by_size = sorted(work.model.groups, key=lambda each: each.weights, reverse=True)
    for settings in dict.fromkeys(group.settings for group in by_size):
        probed = [] if work.options.allocation is None else [probed_settings(settings, level) for level in ANCHORS]
        for each in (settings, *probed):
            found.setdefault(each.code != NO_CODE, each)
    return found


def _shapes(work: Workload) -> list[tuple[int, int]]:
    """Of the linears in a block, each once for every other of its kind; none larger than `LARGEST`."""
    block = max(work.model.blocks, key=lambda each: each.computed)
    found: list[tuple[int, int]] = []
    for group in block.groups:
        shape = min(LARGEST, group.out_features // group.members), min(LARGEST, group.in_features)
        if not group.expert or shape not in found:
            found += [shape] * (1 if group.expert else group.members)
    return found[:MOST_PRODUCTS]
