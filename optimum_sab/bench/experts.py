"""Times of packed experts against every implementation of dense ones in Transformers, side by side in one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from optimum_sab.bench.conditions import Conditions
from optimum_sab.bench.environment import Environment, chosen_backend, describe_environment
from optimum_sab.bench.random_experts import PackedExperts, dense_experts, with_implementation
from optimum_sab.bench.shapes import ExpertsShape
from optimum_sab.bench.timing import Call, median_seconds, rotation_bytes
from optimum_sab.bench.verification import check_error, relative_error
from optimum_sab.core.code import NO_CODE
from optimum_sab.errors import ConfigError, MissingDependencyError

TOKENS = (1, 16, 256)
# The loop over experts waits for the device, so it is in no CUDA graph.
IMPLEMENTATIONS = {"cpu": ("eager", "batched_mm", "grouped_mm"), "cuda": ("batched_mm", "grouped_mm")}

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ExpertsTiming:
    """One shape at one number of tokens.

    Attributes:
        name: where the shape comes from.
        device: name of the GPU or processor.
        backend: what the packed experts computed with.
        dtype: of inputs, outputs and dense weights.
        m: tokens.
        experts, top_k, hidden, intermediate: as in `ExpertsShape`.
        active: experts with tokens, mean over the routings that took turns.
        bits_per_weight: from the stored bytes of the packed experts.
        packed_bytes, dense_bytes: of all experts' weights.
        seconds: of the packed experts, median.
        dense_seconds: of the fastest dense implementation, median.
        dense_implementation: its name.
        implementation_seconds: of every dense one that was timed, by name.
        coded_seconds: of packed experts with a code, None where none was asked for.
        speedup: ``dense_seconds / seconds``.
        error: of the packed experts against the reference, `verification.relative_error`.
    """

    name: str
    device: str
    backend: str
    dtype: str
    m: int
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    active: float
    bits_per_weight: float
    packed_bytes: int
    dense_bytes: int
    seconds: float
    dense_seconds: float
    dense_implementation: str
    implementation_seconds: dict[str, float]
    coded_seconds: float | None
    speedup: float
    error: float


@dataclass(frozen=True)
class ExpertsReport:
    """All rows of one run, and where it ran."""

    environment: Environment
    rows: tuple[ExpertsTiming, ...]


@dataclass(frozen=True)
class _Routed:
    """Inputs [tokens, hidden] with the experts [tokens, top_k] that each goes to, and their weights."""

    x: Tensor
    index: Tensor
    weights: Tensor

    def through(self, forward: Forward) -> Tensor:
        return forward(self.x, self.index, self.weights)


@torch.no_grad()
def compare_experts(
    shapes: Sequence[ExpertsShape],
    tokens: Sequence[int],
    conditions: Conditions,
    on_row: Callable[[ExpertsTiming], None] | None = None,
) -> ExpertsReport:
    """Time the experts of every shape at every number of tokens, packed and dense in turns, after checking the packed.

    Tokens go to random experts. So many routings take turns that their experts' packed weights do not stay in the
    last-level cache, unless there are no more experts. ``batched_mm`` copies the weights of every pair, so it is left
    out where that would be more than half of all experts'.

    Args:
        shapes: of the experts.
        tokens: numbers of them, M.
        conditions: everything else; ``busy`` is not measured here.
        on_row: is given every row as soon as it is there.

    Raises:
        ConfigError: a number is below 1, or busy processes are asked for.
        MissingDependencyError: this Transformers has no implementations of experts.
        WrongResultError: the packed experts' result is not the reference's.
    """
    for name, value in [("--repeats", conditions.repeats), *(("--tokens", m) for m in tokens)]:
        if value < 1:
            raise ConfigError(f"{name} {value} must be at least 1.")
    if conditions.busy:
        raise ConfigError(f"--busy {conditions.busy} is for linears; experts are timed without it.")
    _check_transformers()
    rows: list[ExpertsTiming] = []
    with chosen_backend(conditions.backend, conditions.device) as chosen:
        environment = describe_environment(conditions.device)
        for shape in shapes:
            measured = _Measured(shape, replace(conditions, backend=chosen), environment)
            for m in tokens:
                rows.append(measured.row(m))
                if on_row is not None:
                    on_row(rows[-1])
            del measured
    return ExpertsReport(environment, tuple(rows))


class _Measured:
    """The experts of one shape, dense and packed."""

    def __init__(self, shape: ExpertsShape, conditions: Conditions, environment: Environment) -> None:
        self.shape, self.conditions, self.environment = shape, conditions, environment
        device, settings, seed = conditions.device, conditions.settings, conditions.seed
        self.packed = {"packed": PackedExperts(shape, settings, seed, device)}
        if conditions.code != NO_CODE:
            settings = settings.replace(code=conditions.code)
            self.packed["coded"] = PackedExperts(shape, settings, seed, device)
        self.dense = dense_experts(shape, conditions)

    def row(self, m: int) -> ExpertsTiming:
        shape, conditions, packed = self.shape, self.conditions, self.packed["packed"]
        routed = self._routings(m)
        names = [n for n in IMPLEMENTATIONS[conditions.device.type] if n != "batched_mm" or self._may_copy(m)]
        dense: dict[str, Forward] = {name: partial(with_implementation, self.dense, name) for name in names}
        sides: dict[str, list[Call]] = {}
        errors = {}
        forwards: dict[str, Forward] = {**dense, **self.packed}
        for name, forward in forwards.items():
            sides[name] = [partial(each.through, forward) for each in routed]
            found = routed[0].through(forward)
            if name in self.packed:
                errors[name] = relative_error(found, routed[0].through(self.packed[name].reference))
                what = f"backend {conditions.backend!r}, experts {shape.name}, {m} tokens: the result"
                check_error(errors[name], conditions.dtype, what)
        seconds = median_seconds(sides, conditions.device, conditions.repeats)
        fastest = min(dense, key=seconds.__getitem__)
        weights = 3 * shape.experts * shape.hidden * shape.intermediate
        return ExpertsTiming(
            name=shape.name,
            device=self.environment.device,
            backend=conditions.backend,
            dtype=str(conditions.dtype).removeprefix("torch."),
            m=m,
            experts=shape.experts,
            top_k=shape.top_k,
            hidden=shape.hidden,
            intermediate=shape.intermediate,
            active=sum(len(each.index.unique()) for each in routed) / len(routed),
            bits_per_weight=8 * packed.bytes / weights,
            packed_bytes=packed.bytes,
            dense_bytes=weights * conditions.dtype.itemsize,
            seconds=seconds["packed"],
            dense_seconds=seconds[fastest],
            dense_implementation=fastest,
            implementation_seconds={name: seconds[name] for name in dense},
            coded_seconds=seconds.get("coded"),
            speedup=seconds[fastest] / seconds["packed"],
            error=errors["packed"],
        )

    def _routings(self, m: int) -> list[_Routed]:
        """Random inputs and experts, as many as it takes for their packed weights not to stay in the cache."""
        shape, conditions = self.shape, self.conditions
        each = self.packed["packed"].bytes / shape.experts * min(shape.experts, m * shape.top_k)
        count = max(1, min(-(-rotation_bytes(conditions.device) // int(each)), -(-shape.experts // shape.top_k)))
        device, found = conditions.device, []
        generator = torch.Generator(device).manual_seed(conditions.seed)
        for _ in range(count):
            x = torch.randn(m, shape.hidden, dtype=conditions.dtype, device=device, generator=generator)
            scores = torch.rand(m, shape.experts, device=device, generator=generator)
            weights, index = scores.topk(shape.top_k)
            found.append(_Routed(x, index, (weights / weights.sum(-1, keepdim=True)).to(conditions.dtype)))
        return found

    def _may_copy(self, m: int) -> bool:
        return 2 * m * self.shape.top_k <= self.shape.experts


def _check_transformers() -> None:
    """Raises: MissingDependencyError: Transformers is older than its experts interface."""
    import transformers

    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"Transformers {transformers.__version__} has no implementations of experts to compare with; install 5."
        ) from error
