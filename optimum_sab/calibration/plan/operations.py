"""How many operations each part of a run is: the one place with the formulas. An addition and a product are two.

``n`` is the width of an input, ``o`` the outputs of the linears that are solved as one stack, ``T`` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from optimum_sab.calibration.blocks.measured import ROWS
from optimum_sab.calibration.plan.workload import LinearGroup, Workload
from optimum_sab.calibration.statistics.gathering import fewer_as_correction
from optimum_sab.core.code import NO_CODE
from optimum_sab.core.coded import DESCENTS, START_ITERATIONS
from optimum_sab.core.factorization import WIDE
from optimum_sab.core.hessian import STRIP
from optimum_sab.core.settings import LayerSettings
from optimum_sab.core.solver import JUDGED_ROWS
from optimum_sab.core.target import SKETCH

PASSES = 60  # counted in profiles of Llama and Qwen2.5-VL
SOLVING = (
    "cross-validation",
    "factorization",
    "target",
    "refit",
    "alternating fit",
    "feedback",
    "descent",
    "errors",
    "packing",
)
"""Parts of `optimum_sab.core.solver.solve`, as it names them (`core.parts`)."""


def products(work: Workload, tokens: float, patches: int = 0) -> float:
    """Of a forward: ``2 T w`` of every weight w in the decoder blocks that a token meets, and ``2 p w`` of p patches in
    what reads pictures.
    """
    computed = sum(block.computed for block in work.model.blocks)
    return 2.0 * tokens * computed + 2.0 * patches * work.model.tower


def attention(work: Workload, samples: Sequence[int]) -> float:
    """``4 T² d`` of every sample in every block.

    Args:
        work: all of it.
        samples: tokens of each.
    """
    return sum(4.0 * tokens**2 for tokens in samples) * work.model.width * len(work.model.blocks)


def elementwise(work: Workload, tokens: float) -> float:
    """Numbers that a forward goes through outside of its products: `PASSES` hidden states of d in every block, ``T d``
    each, for norms, positions, activations, sums.
    """
    return PASSES * tokens * work.model.width * len(work.model.blocks)


def head(work: Workload, tokens: float) -> float:
    """Of the output embedding: ``2 T V d``."""
    return 2.0 * tokens * work.model.vocabulary * work.model.width


def predictions(work: Workload, tokens: float) -> float:
    """Numbers in the logits of so many tokens, ``T V``: what a softmax and a divergence go through."""
    return float(tokens) * work.model.vocabulary


def hessian(tokens: float, n: int, on_cpu: bool = True) -> float:
    """``X̂ᵀ X̂``: ``T n (n + s)`` on a CPU, where the upper half is computed in strips of s rows; else ``2 T n²``."""
    return tokens * n * (n + (min(STRIP, n) if on_cpu else n))


def gathers_correction(group: LinearGroup, two_streams: bool) -> bool:
    """Whether ``W C + R`` is gathered in the place of the drift C (statistics/gathering.py)."""
    alone = two_streams and group.members == 1 and not group.expert
    return alone and fewer_as_correction(group.out_features, group.in_features, group.at_residual)


def second_moments(group: LinearGroup, tokens: float, two_streams: bool, on_cpu: bool = True) -> float:
    """Statistics of one input.

    They are `hessian`; with a dense stream also ``2 T n²`` for the drift, and, where the output is added to the hidden
    state, ``2 T o n`` for the residual; or ``4 T o n`` for both where that is less.
    """
    rows, n = tokens * group.share, group.in_features
    product = 2.0 * rows * group.out_features * n
    found = hessian(rows, n, on_cpu)
    if gathers_correction(group, two_streams):
        found += 2.0 * product
    elif two_streams:
        found += 2.0 * rows * n**2 + (product if group.at_residual else 0.0)
    return found


def errors_by_modality(group: LinearGroup, tokens: float, modalities: int) -> float:
    """``W x`` and ``Q x̂`` of `ROWS` tokens of each modality, ``4 T o n``."""
    return 4.0 * min(ROWS * modalities, tokens * group.share) * group.weights


def factorization(n: int) -> float:
    """Cholesky factor ``n³/3``, inverse ``2 n³/3``, Cholesky factor of the inverse ``n³/3``; from `WIDE` columns on a
    factor ``n³/3`` and its inverse ``n³/3``.
    """
    return (2.0 if n >= WIDE else 4.0) * n**3 / 3.0


def solving(out: int, n: int, settings: LayerSettings, two_streams: bool, corrected: bool = False) -> dict[str, float]:
    """One `solve`, part by part. What no product dominates counts entries, in a unit that only ratios are taken of.

    - cross-validation, of two halves: a Cholesky factor ``n³/3`` each, solving with it ``2 o n²``, ``D H`` ``2 o n²``,
      and ``W C`` ``2 o n²``; from `WIDE` columns on of `SKETCH` rows in the place of o;
    - factorization: `factorization`;
    - target: ``W C`` and its product with the inverse, ``4 o n²``;
    - refit: the pull ``2 o n²``, and every refit ``2 o n²`` for each plane; from `WIDE` columns on ``o n²``, of a
      residual plane its share of that;
    - alternating fit: entries times rounds, planes and one;
    - feedback: ``o n²`` between blocks and ``2 o n b`` inside of blocks of b columns;
    - descent: ``2 o n² + 2 o n b`` a sweep;
    - errors: ``2 o n²``, from `WIDE` columns on ``n²`` for each of some `JUDGED_ROWS`; as much again without a refit;
    - with a code, feedback and descent are searches, which count entries, and `DESCENTS` descents a sweep, at most, end
      with column scales, ``2 o n² + 2 n³/3``, row scales and an error, ``2 o n²``;
    - packing, and what is packed dense again: entries times planes.

    Args:
        out: o.
        n: columns.
        settings: of the linears.
        two_streams: whether there is a dense stream to aim at.
        corrected: `gathers_correction`; then there is no ``W C`` to compute.
    """
    entries, square = float(out) * n, float(out) * n**2
    block = min(settings.block_size, n)
    extra = settings.salient_fraction * settings.residual_planes if settings.residual_planes else 0.0
    halved = n >= WIDE
    judged = float(len(range(0, out, max(1, out // JUDGED_ROWS))))
    few = float(min(out, SKETCH) if n >= WIDE else out) * n**2
    refit = square * ((settings.base_planes + extra) if halved else 2.0 * settings.planes)
    aims = two_streams and settings.propagation != 0.0
    chosen = two_streams and settings.propagation is None
    coded = settings.code != NO_CODE
    sweeps, again = (0, DESCENTS * settings.sweeps) if coded else (settings.sweeps, 0)
    searches = coded + again
    iterations = min(settings.iterations, START_ITERATIONS) if coded else settings.iterations
    scales = again * (2.0 * square + 2.0 * n**3 / 3.0) + searches * refit
    return {
        "cross-validation": 2.0 * n**3 / 3.0 + (8.0 if corrected else 12.0) * few if chosen else 0.0,
        "factorization": factorization(n),
        "target": (2.0 if corrected else 4.0) * square if aims else 0.0,
        "refit": 2.0 * square + (sweeps + 1) * refit + scales if settings.refit else 0.0,
        "alternating fit": entries * iterations * (settings.base_planes + extra + 1.0),
        "feedback": entries if coded else square + 2.0 * entries * block,
        "descent": again * entries + sweeps * (2.0 * square + 2.0 * entries * block),  # which is nothing without refits
        "packing": entries * (settings.base_planes + extra),
        "errors": (1.0 if settings.refit else 2.0) * (judged * n**2 if n >= WIDE else 2.0 * square)
        + searches * 2.0 * square,
    }
