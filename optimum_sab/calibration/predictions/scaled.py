"""The divergence from the dense model where the binarized one's logits are scaled, for a search in the scale.

``KL(p ‖ softmax(s z)) = Σ_v p_v log p_v − s Σ_v p_v z_v + log Σ_v exp(s z_v)``: where a head makes ``s z`` of ``s h``,
only the last term is to be found again for every s, without a product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest

import torch
from torch import Tensor

from optimum_sab.calibration.predictions.divergence import divergences, in_turns
from optimum_sab.calibration.ranks import Ranks

KEPT_BYTES = 2**29  # of logits that are kept; the others are made again for every scale
LogitsOf = Callable[[Tensor], Tensor]


class ScaledDivergence:
    """Mean ``KL(p ‖ q(s))`` per token.

    Args:
        logits_of: hidden states [tokens, width] to logits [tokens, vocabulary].
        dense: what the dense model gave to its head, in chunks [tokens, width] whose logits find room.
        mine: what the binarized one gave, in the same chunks.
        ranks: that share the chunks, all of which every rank is given; all make the same calls and get the same.

    Attributes:
        unscaled: at s = 1.
    """

    def __init__(
        self,
        logits_of: LogitsOf,
        dense: Sequence[Tensor],
        mine: Sequence[Tensor],
        ranks: Ranks | None = None,
    ) -> None:
        self._logits_of, self._ranks = logits_of, ranks or Ranks()
        self._tokens = sum(len(chunk) for chunk in dense)
        own = slice(self._ranks.rank, None, self._ranks.size)
        self._dense, self._mine = dense[own], mine[own]
        self._scales_along = _scales_along(logits_of, mine[0])
        self._kept: list[Tensor | None] = []
        self._terms: list[tuple[Tensor, Tensor]] = []
        totals, room = [], KEPT_BYTES
        for wanted, given in zip(self._dense, self._mine, strict=True):
            p, z = logits_of(wanted), logits_of(given.float())
            totals.append(float(divergences(z, p).sum(dtype=torch.float64)))
            if self._scales_along:
                self._terms.append(_terms(p, z))
                room -= z.nbytes
                self._kept.append(z if room >= 0 else None)
        self.unscaled = self._mean(totals)

    def exactly(self, scale: float) -> float:
        """At a scale, from the model's own logits there."""
        totals = []
        for wanted, given in zip(self._dense, self._mine, strict=True):
            found = divergences(self._logits_of(scale * given.float()), self._logits_of(wanted))
            totals.append(float(found.sum(dtype=torch.float64)))
        return self._mean(totals)

    def at(self, scale: float) -> float:
        """At a scale, to rounding, and in less time where logits scale along with what the head is given."""
        if not self._scales_along:
            return self.exactly(scale)
        totals = []
        for given, kept, (entropy, mean) in zip(self._mine, self._kept, self._terms, strict=True):
            logits = self._logits_of(given) if kept is None else kept
            normalizer = in_turns(lambda some: (scale * some.float()).logsumexp(-1), [logits], torch.float32)
            totals.append(float((normalizer.double() - scale * mean - entropy).sum()))
        return self._mean(totals)

    def _mean(self, totals: Sequence[float]) -> float:
        """Per token, of this rank's chunks and the others', added in the order of the chunks."""
        told = self._ranks.exchange("divergences", totals)
        turns = zip_longest(*told)  # a rank has every so manyeth chunk
        return sum(each for some in turns for each in some if each is not None) / self._tokens


def _scales_along(logits_of: LogitsOf, given: Tensor) -> bool:
    """Whether logits double with what the head is given, which rounds nothing; no cap, no bias."""
    some = given[:4].float()
    return torch.equal(logits_of(2 * some), 2 * logits_of(some))


def _terms(dense: Tensor, mine: Tensor) -> tuple[Tensor, Tensor]:
    """``−Σ_v p_v log p_v`` and ``Σ_v p_v z_v`` of every token, float64 [tokens]."""

    def both(wanted: Tensor, given: Tensor) -> Tensor:
        log_p = wanted.float().log_softmax(-1)
        p = log_p.exp()
        sums = -(p * log_p).sum(-1, dtype=torch.float64), (p * given.float()).sum(-1, dtype=torch.float64)
        return torch.stack(sums, -1)

    entropy, mean = in_turns(both, [dense, mine], torch.float64, 2).unbind(-1)
    return entropy, mean
