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
from optimum_sab.calibration.ranks import Ranks
from optimum_sab.calibration.streams.patching import patched_forwards

TOKENS = 4096  # of theirs that are judged, at most
SCALES = (0.5, 1.25)  # of the logits; between them the divergence is looked for
TOLERANCE = 0.02
CHUNK = 256  # tokens whose logits are held at a time, on each of several ranks


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
    model: nn.Module,
    last: LastNorm,
    samples: Sequence[HeadInputs],
    device: torch.device | None = None,
    ranks: Ranks | None = None,
) -> Temperature | None:
    """Scale the norm before the output embedding so that the predictions come closest to the dense model's.

    ``s = argmin_s Σ_t KL(p_t ‖ softmax(z_t(s ĥ_t)))``, with ĥ what the binarized model gives to the embedding and z the
    model's own way from there to its logits. In s the divergence of logits that are linear is convex.

    Args:
        model: binarized, in eval mode.
        last: its norm before the embedding (`find_last_norm`).
        samples: what the streams gave to the embedding, on this rank.
        device: where the embedding computes; None leaves it where it is.
        ranks: that share the work, whoever has the samples, to the same result; None for this process alone.

    Returns:
        None, and the model left as it is, where no text is judged or nothing is gained.
    """
    ranks = ranks or Ranks()
    chosen = _chosen(samples, ranks)
    if chosen is None:
        return None
    dense, mine = (tokens.split(CHUNK) for tokens in chosen)
    with patched_forwards(replaying(last.blocks)), SharedHead(model, last.head, device).open() as shared:
        divergence = ScaledDivergence(lambda h: shared.logits_of(h[None], last.carrier)[0], dense, mine, ranks)
        before = divergence.unscaled
        scale, _ = _minimum(divergence.at, *SCALES)
        after = divergence.exactly(scale)
    if not after < before or not last.scale(scale):
        return None
    return Temperature(1.0 / scale, before, after)


def _chosen(samples: Sequence[HeadInputs], ranks: Ranks) -> tuple[Tensor, Tensor] | None:
    """At most `TOKENS` of all ranks' judged tokens, evenly spread, in both streams [tokens, width], on every rank.

    Only they travel. None where no token is judged.
    """
    told = ranks.exchange("judged tokens", {each.sample: int(each.text.sum()) for each in samples})
    counts = {sample: count for some in told for sample, count in some.items()}
    step = -(-sum(counts.values()) // TOKENS)
    if not step:
        return None
    first, place = {}, 0  # of every sample's judged tokens the first that is chosen
    for sample in sorted(counts):
        first[sample] = -place % step
        place += counts[sample]
    own = {each.sample: _every(each, first[each.sample], step) for each in samples}
    given = {sample: pair for some in ranks.gather("hidden states", own) for sample, pair in some.items()}

    def joined() -> tuple[Tensor, Tensor]:
        both = zip(*(given[sample] for sample in sorted(given)), strict=True)
        # what others gave is on the CPU
        dense, mine = (torch.cat([each.to(some[0].device) for each in some]) for some in both)
        return dense, mine

    return ranks.give("chosen tokens", 0, joined)


def _every(inputs: HeadInputs, first: int, step: int) -> tuple[Tensor, Tensor]:
    """Some of the judged tokens in both streams, [tokens, width]."""
    places = inputs.text.nonzero()[first::step, 0]
    return inputs.dense[0][places.to(inputs.dense.device)], inputs.binarized[0][places.to(inputs.binarized.device)]


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
