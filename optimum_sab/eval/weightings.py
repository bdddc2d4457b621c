"""Calibration passes with other weightings of modalities and of experts' tokens, to compare the default one with."""

from __future__ import annotations

from collections.abc import Callable

from optimum_sab.calibration.statistics.hessian import HessianPass
from optimum_sab.calibration.statistics.passes import register_pass
from optimum_sab.core.hessian import InputStatistics
from optimum_sab.core.mixture import mixed_by, mixed_statistics


@register_pass("hessian-tokens")
class TokenCountPass(HessianPass):
    """Every token weighs the same, so the modality with more tokens decides."""

    weighting = "tokens"


@register_pass("hessian-text")
class TextPass(HessianPass):
    """The Hessian sees text alone, as the paper's compensation does."""

    weighting = "text"


@register_pass("hessian-own")
class OwnPass(HessianPass):
    """Every expert is solved with its own statistics alone; with those of all only where no token comes to it."""

    def of_expert(self, own: InputStatistics, shared: Callable[[], InputStatistics], full: int) -> InputStatistics:
        return own if any(own.tokens.values()) else mixed_statistics(own, shared(), 0)


@register_pass("hessian-shared")
class SharedPass(HessianPass):
    """Every expert is solved with the statistics of what comes to any of them."""

    def of_expert(self, own: InputStatistics, shared: Callable[[], InputStatistics], full: int) -> InputStatistics:
        return mixed_by(own, shared(), 0.0)
