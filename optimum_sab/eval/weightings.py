"""Calibration passes with other weightings of the modalities, to compare the balanced one with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from optimum_sab.calibration.modality import TEXT, TokenModalities
from optimum_sab.calibration.passes import HessianPass, PairedInputs, register_pass
from optimum_sab.core.hessian import InputStatistics


@register_pass("hessian-tokens")
class TokenCountPass(HessianPass):
    """Every token weighs the same, so the modality with more tokens decides."""

    weighting = "tokens"


@register_pass("hessian-text")
class TextPass(HessianPass):
    """The Hessian sees text alone, as the paper's compensation does."""

    weighting = "text"


@register_pass("hessian-context")
class ContextPass(HessianPass):
    """Text beside a picture is a modality of its own, so that long plain texts do not drown questions and answers."""

    def collect(self, name: str, inputs: Sequence[PairedInputs], device: torch.device) -> InputStatistics:
        return super().collect(name, [_with_context(pair) for pair in inputs], device)


def _with_context(pair: PairedInputs) -> PairedInputs:
    labels, names = pair.modalities.labels, pair.modalities.names
    if bool(pair.modalities.text.all()) or not bool(pair.modalities.text.any()):
        return pair
    moved = labels.masked_fill(pair.modalities.text, len(names))
    return replace(pair, modalities=TokenModalities((*names, f"{TEXT} in context"), moved))
