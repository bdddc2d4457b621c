"""An expert that few tokens reach is solved on a mixture of its own second moments and those that all experts share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optimum_sab.core.bounds import check_integer
from optimum_sab.core.hessian import InputStatistics, WeightedMoments
from optimum_sab.errors import CalibrationError

if TYPE_CHECKING:
    from torch import Tensor

MOST = 1_000_000_000
SHARED = 4  # the shared moments count as a quarter of the tokens from which on they are not needed


def own_share(tokens: int, full: int) -> float:
    """The weight of an expert's own moments in the mixture, ``n / (n + full / 4)``; 1 from ``full`` tokens on.

    The shared moments count as much as ``full / 4`` tokens of the expert's own, as when a covariance is shrunk to one
    that is known beforehand. Behind SmolLM2's layer 8 (width 576, clusters of tokens as experts) the share with the
    least held-out error was 0.05 of 4 tokens, 0.05 to 0.1 of 16, 0.2 of 64, 0.5 of 256 and 0.85 of 1,024; the rule with
    ``full = 1024`` says 0.015, 0.06, 0.2, 0.5 and 1, each within 3 % of the least error. Own moments alone
    were 52, 42, 39, 23 and 3 % above it, shared ones alone 1, 4, 12, 28 and 49 %
    (`python -m optimum_sab.eval.few_tokens`).
    """
    return 1.0 if tokens >= full else tokens / (tokens + full / SHARED)


def mixed_statistics(own: InputStatistics, shared: InputStatistics, full: int) -> InputStatistics:
    """Statistics to solve an expert with: its own, those of all tokens, or a mixture.

    ``H = w H_own + (1 − w) H_shared``, and the same for drift and residual. Both have a mean diagonal of 1, so that w
    is the share of what the error is weighted with; see `own_share`.

    Args:
        own: of the expert's tokens; `InputStatistics.without_data` where it got none.
        shared: of the tokens of all experts, of the same input and streams.
        full: from so many tokens on the expert's own are enough; about twice the width is.

    Returns:
        Its tokens are the expert's own. A residual that one side does not know counts as zero there. Where one side has
        no halves it is all in the second, so that what is fitted to one half is still judged by other tokens.

    Raises:
        ConfigError: ``full`` is no integer or is negative.
        CalibrationError: the two differ in width, or in whether two streams were gathered.
    """
    check_integer("full", full, 0, MOST, "; 0 solves every expert on its own tokens")
    width, other = own.hessian.shape[0], shared.hessian.shape[0]
    if width != other:
        raise CalibrationError(
            f"an expert's statistics are of {width} inputs and the shared ones of {other}; gather both at one place."
        )
    tokens = sum(own.tokens.values())
    return mixed_by(own, shared, own_share(tokens, full) if tokens else 0.0)


def mixed_by(own: InputStatistics, shared: InputStatistics, share: float) -> InputStatistics:
    """`mixed_statistics` with a given share of the expert's own.

    Raises:
        CalibrationError: one side alone holds the drift between the streams.
    """
    if share == 1.0:
        return own
    if share == 0.0:
        return InputStatistics(
            shared.hessian, shared.by_modality, shared.drift, own.tokens, shared.residual, shared.half
        )
    if (own.drift is None) != (shared.drift is None):
        raise CalibrationError(
            "an expert's statistics and the shared ones differ in whether they hold the drift between the streams; "
            "gather both in one pass."
        )
    whole = _mixed(own.whole, shared.whole, share)
    halves = [None if each.half is None else each.half for each in (own, shared)]
    half = None if halves == [None, None] else _mixed(halves[0], halves[1], share)
    names = dict.fromkeys((*own.by_modality, *shared.by_modality))
    both = own.by_modality and shared.by_modality  # asked for of both, or of none
    by_modality = {
        name: _sum(own.by_modality.get(name), shared.by_modality.get(name), share, alone=True) for name in names if both
    }
    return InputStatistics(
        whole.hessian,
        {name: H for name, H in by_modality.items() if H is not None},
        whole.drift,
        own.tokens,
        whole.residual,
        half,
    )


def _mixed(own: WeightedMoments | None, shared: WeightedMoments | None, share: float) -> WeightedMoments:
    """``w`` times one and ``1 − w`` times the other; what is not there counts as zero."""
    hessian, drift, residual = (
        _sum(getattr(own, name, None), getattr(shared, name, None), share) for name in ("hessian", "drift", "residual")
    )
    assert hessian is not None
    return WeightedMoments(hessian, drift, residual)


def _sum(own: Tensor | None, shared: Tensor | None, share: float, alone: bool = False) -> Tensor | None:
    """``w · own + (1 − w) · shared``; of one that is there alone its part, or with ``alone`` all of it."""
    if own is None or shared is None:
        only, weight = (shared, 1.0 - share) if own is None else (own, share)
        return only if only is None or alone else only * weight
    return own * share + shared * (1.0 - share)
