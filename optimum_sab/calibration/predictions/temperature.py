"""The temperature at which a binarized model's predictions are closest to the dense one's (Guo et al., 1706.04599).

Every linear in the blocks is corrected for what its input has lost. The output embedding stays dense and is not: it is
given the dense model's hidden state and noise, and the logits it makes of the two are too sure of themselves. One
number makes up for most of that, and it costs nothing to store: the norm before the embedding takes it up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from optimum_sab.calibration.predictions.at_head import HeadInputs
from optimum_sab.calibration.predictions.head import SharedHead
from optimum_sab.calibration.predictions.last_norm import LastNorm, replaying
from optimum_sab.calibration.predictions.scaled import ScaledDivergence
from optimum_sab.calibration.streams.patching import patched_forwards

TOKENS = 4096  # of theirs that are judged, at most
SCALES = (0.5, 1.25)  # of the logits; between them the divergence is looked for
TOLERANCE = 0.02
CHUNK = 512  # tokens whose logits are held at a time


@dataclass(frozen=True)
class Temperature:
    """What came of it.

    Attributes:
        value: by which the logits were divided.
        before: mean ``KL(dense ‖ binarized)`` per text token of the samples, in nats, at temperature 1.
        after: the same at ``value``.
    """

    value: float
    before: float
    after: float


@torch.no_grad()
def set_temperature(
    model: nn.Module, last: LastNorm, samples: Sequence[HeadInputs], device: torch.device | None = None
) -> Temperature | None:
    """Scale the norm before the output embedding so that the predictions come closest to the dense model's.

    ``s = argmin_s Σ_t KL(p_t ‖ softmax(z_t(s ĥ_t)))``, with ĥ what the binarized model gives to the embedding and z the
    model's own way from there to its logits. In s the divergence of logits that are linear is convex.

    Args:
        model: binarized, in eval mode.
        last: its norm before the embedding (`find_last_norm`).
        samples: what the streams gave to the embedding.
        device: where the embedding computes; None leaves it where it is.

    Returns:
        None, and the model left as it is, where no text is judged or nothing is gained.
    """
    if not any(bool(s.text.any()) for s in samples):
        return None
    dense = _thinned([s.dense[0][s.text.to(s.dense.device)] for s in samples])
    mine = _thinned([s.binarized[0][s.text.to(s.binarized.device)] for s in samples])
    with patched_forwards(replaying(last.blocks)), SharedHead(model, last.head, device).open() as shared:
        divergence = ScaledDivergence(lambda h: shared.logits_of(h[None], last.carrier)[0], dense, mine)
        before = divergence.unscaled
        scale, _ = _minimum(divergence.at, *SCALES)
        after = divergence.exactly(scale)
    if not after < before or not last.scale(scale):
        return None
    return Temperature(1.0 / scale, before, after)


def _thinned(hidden: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """At most `TOKENS` of these [tokens, width], evenly spread, in chunks."""
    tokens = torch.cat(list(hidden))
    return tokens[:: -(-len(tokens) // TOKENS)].split(CHUNK)


def _minimum(function: Callable[[float], float], low: float, high: float) -> tuple[float, float]:
    """Golden-section search for the minimum of a function with one valley: (where, its value)."""
    golden = (math.sqrt(5.0) - 1.0) / 2.0
    left, right = high - golden * (high - low), low + golden * (high - low)
    at_left, at_right = function(left), function(right)
    while high - low > TOLERANCE:
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - golden * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + golden * (high - low)
            at_right = function(right)
    return (left, at_left) if at_left <= at_right else (right, at_right)
