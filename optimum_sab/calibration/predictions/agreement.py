"""How far a binarized model's predictions are from the dense one's on samples that did not calibrate it.

A calibration can go well by every figure of its own and leave a model that has lost what its samples did not show. So
the dense model reads a few samples before the work, and the finished one the same samples after it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optimum_sab.calibration.predictions.divergence import divergences
from optimum_sab.calibration.predictions.head import SharedHead, output_embedding
from optimum_sab.calibration.samples.modality import token_modalities
from optimum_sab.calibration.streams.mapped import MappedActivations
from optimum_sab.calibration.streams.modes import reading
from optimum_sab.calibration.streams.placement import home_of, map_tensors
from optimum_sab.calibration.streams.together import given_together
from optimum_sab.nn.streamed import streamed_blocks

FEWEST = 4  # samples whose spread is told


@dataclass(frozen=True)
class Agreement:
    """Next-token predictions against the dense model's, over text tokens.

    Attributes:
        kl: mean ``KL(dense ‖ binarized)`` in nats.
        top1: share of tokens for which both models' likeliest token is the same.
        kl_error: standard error of ``kl`` over samples, in nats: what other samples of the kind would move it by; None
            of fewer than `FEWEST`, which tell nothing of others.
    """

    kl: float
    top1: float
    kl_error: float | None = None

    @classmethod
    def of(cls, pairs: Iterable[tuple[Tensor, Tensor]]) -> Agreement:
        """Over all tokens of pairs of logits [tokens, vocabulary], the binarized model's first; a pair is a sample."""
        kl, same = [], []
        for mine, dense in pairs:
            kl.append(divergences(mine, dense).double().cpu())
            same.append((mine.argmax(-1) == dense.argmax(-1)).double().cpu())
            del mine, dense  # before the next pair is made
        mean = float(torch.cat(kl).mean())
        return cls(mean, float(torch.cat(same).mean()), _standard_error(kl, mean))

    def __str__(self) -> str:
        error = "" if self.kl_error is None else f" ± {self.kl_error:.2f}"
        return f"KL {self.kl:.2f}{error} nats per token, {self.top1:.0%} of the likeliest tokens the same"


def _standard_error(samples: Sequence[Tensor], mean: float) -> float | None:
    """``√(S/(S−1) Σ_s (Σ_t (k_st − k̄))²) / T``: of a mean over T tokens that come in S samples, as a ratio's is."""
    if len(samples) < FEWEST:
        return None
    off = sum(float((each - mean).sum()) ** 2 for each in samples)
    return math.sqrt(len(samples) / (len(samples) - 1) * off) / sum(map(len, samples))


@dataclass(frozen=True)
class _Given:
    """What the dense model gives to its head at the tokens of a sample that are judged.

    Attributes:
        judged: bool [tokens].
        hidden: [1, judged tokens, width].
    """

    judged: Tensor
    hidden: Tensor


class AgreementCheck:
    """Of every sample it keeps what the dense model gives to its output embedding at the tokens that are judged.

    Args:
        model: dense.
        samples: forward keyword arguments, one sample each, by kind.
        blocks: the decoder blocks in the order of their calls, through which samples go together where the blocks'
            weights are streamed.
        device: where they compute then; None leaves them where they are.
        mapped: what bounds the memory of samples that wait then; None for no bound.
    """

    def __init__(
        self,
        model: nn.Module,
        samples: Mapping[str, Sequence[Mapping[str, Any]]],
        blocks: Sequence[nn.Module] = (),
        device: torch.device | None = None,
        mapped: MappedActivations | None = None,
    ) -> None:
        self._model = model
        home = home_of(model)
        self._samples = {kind: [map_tensors(dict(s), home) for s in some] for kind, some in samples.items()}
        self._dense: dict[str, list[_Given]] = {}
        self._head = output_embedding(model)
        if self._head is None:
            return
        if streamed_blocks(model):
            with reading(model):
                flat = [sample for some in self._samples.values() for sample in some]
                found = iter(given_together(model, flat, blocks, self._head, device, mapped))
                self._dense = {k: [self._judged(s, next(found)) for s in some] for k, some in self._samples.items()}
            return
        with reading(model), SharedHead(model, self._head).open() as shared:
            self._dense = {k: [self._judged(s, shared.given(s)) for s in some] for k, some in self._samples.items()}

    def measure(self) -> dict[str, Agreement]:
        """The model as it is now against the dense one, by kind; empty for a model without an output embedding."""
        if self._head is None:
            return {}
        with reading(self._model), SharedHead(self._model, self._head).open() as shared:
            return {kind: Agreement.of(self._logits(kind, shared)) for kind in self._dense}

    def _judged(self, sample: Mapping[str, Any], given: Tensor) -> _Given:
        judged = token_modalities(sample, getattr(self._model, "config", None)).judged(given.shape[-2])
        return _Given(judged, given[..., judged.to(given.device), :])

    def _logits(self, kind: str, shared: SharedHead) -> Iterator[tuple[Tensor, Tensor]]:
        for sample, given in zip(self._samples[kind], self._dense[kind], strict=True):
            yield _first(*shared.logits(sample, given.hidden, given.judged))  # of which nothing is held here


def _first(mine: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
    """Of a batch of one."""
    return mine[0], dense[0]
