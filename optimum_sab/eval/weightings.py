"""Calibration passes with other weightings of the modalities, to compare the balanced one with."""

from __future__ import annotations

from optimum_sab.calibration.statistics.hessian import HessianPass
from optimum_sab.calibration.statistics.passes import register_pass


@register_pass("hessian-tokens")
class TokenCountPass(HessianPass):
    """Every token weighs the same, so the modality with more tokens decides."""

    weighting = "tokens"


@register_pass("hessian-text")
class TextPass(HessianPass):
    """The Hessian sees text alone, as the paper's compensation does."""

    weighting = "text"
