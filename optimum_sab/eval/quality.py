"""Quantize one model by many methods on the same calibration data, and measure every result in the same way."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from optimum_sab.core.settings import LayerSettings
from optimum_sab.eval.continuations import Continuations, continued, prompts_of
from optimum_sab.eval.measures import agreement, layer_errors, perplexity
from optimum_sab.eval.methods import DENSE, Method
from optimum_sab.eval.simulation import simulate
from optimum_sab.eval.subject import Subject
from optimum_sab.example.evaluation import evaluate
from optimum_sab.nn.selection import select_linears


@dataclass(frozen=True)
class Measurement:
    """One method under one calibration seed.

    Attributes:
        method: its name, "dense" for the model as it is.
        family: the line of the picture it belongs to.
        seed: of the calibration data.
        bits_per_weight: of the quantized linears, everything a decoder needs counted; dense: bits of the dtype.
        seconds: of the quantization.
        perplexity: per held-out text.
        accuracy: right answers per task, 0 to 1.
        layer_error: mean relative output error of the linears on held-out inputs, per modality.
        kl: mean KL from the dense model's next-token predictions, nats.
        top1: share of tokens with the same likeliest token.
        continuations: how it goes on by itself; None where that was not asked for.
    """

    method: str
    family: str
    seed: int
    bits_per_weight: float
    seconds: float
    perplexity: dict[str, float]
    accuracy: dict[str, float]
    layer_error: dict[str, float]
    kl: float
    top1: float
    continuations: Continuations | None = None

    @property
    def mean_accuracy(self) -> float | None:
        """Mean over tasks; None where there are none."""
        return statistics.mean(self.accuracy.values()) if self.accuracy else None


@dataclass(frozen=True)
class Spread:
    """Mean, least and greatest of a figure over seeds."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.mean(values), min(values), max(values))


@dataclass(frozen=True)
class Quality:
    """All measurements of one model, the dense model's first."""

    subject: str
    dense: Measurement
    rows: tuple[Measurement, ...]

    def methods(self) -> list[str]:
        """Names in the order they were asked for."""
        return list(dict.fromkeys(row.method for row in self.rows))

    def spread(self, method: str, figure: Callable[[Measurement], float]) -> Spread:
        """A figure of one method over its seeds."""
        return Spread.of([figure(row) for row in self.rows if row.method == method])


def compare_quality(
    subject: Subject,
    methods: Sequence[Method],
    seeds: Sequence[int] = (0,),
    on_row: Callable[[Measurement], None] | None = None,
) -> Quality:
    """Measure the dense model, then every method under every seed.

    The dense model stays in memory beside the quantized one: predictions and layers are compared on the same inputs.

    Args:
        subject: the model and what to ask of it.
        methods: what to compare.
        seeds: of the calibration data.
        on_row: called with each measurement when it is there.
    """
    dense = subject.load()
    names = list(select_linears(dense, LayerSettings(), [], {}).settings)
    bits = 8.0 * next(dense.parameters()).element_size()
    perplexities, accuracies = _perplexity(subject, dense), _accuracy(subject, dense)
    prompts = _prompts(subject)
    goes_on = continued(dense, prompts) if prompts else []
    own = Continuations.of(goes_on, goes_on) if prompts else None
    first = Measurement(DENSE, DENSE, 0, bits, 0.0, perplexities, accuracies, {}, 0.0, 1.0, own)
    if on_row is not None:
        on_row(first)
    rows = []
    beside = _Beside(dense, names, goes_on)
    for row in _rows(subject, beside, methods, seeds):
        rows.append(row)
        if on_row is not None:
            on_row(row)
    return Quality(subject.name, first, tuple(rows))


@dataclass(frozen=True)
class _Beside:
    """The dense model, the names of the linears that are compared, and how it goes on from the prompts."""

    dense: nn.Module
    names: list[str]
    goes_on: list[list[int]]


def _prompts(subject: Subject) -> list[Mapping[str, Any]]:
    return prompts_of(subject.texts, subject.probes, subject.budget.continuations)


def _rows(subject: Subject, beside: _Beside, methods: Sequence[Method], seeds: Sequence[int]) -> Iterator[Measurement]:
    dense, names, prompts = beside.dense, beside.names, _prompts(subject)
    for method in methods:
        for seed in seeds:
            model, bits, seconds = _quantize(subject, method, seed)
            predictions = agreement(dense, model, subject.probes)
            yield Measurement(
                method=method.name,
                family=method.family,
                seed=seed,
                bits_per_weight=bits,
                seconds=seconds,
                perplexity=_perplexity(subject, model),
                accuracy=_accuracy(subject, model),
                layer_error=layer_errors(dense, model, names, subject.probes),
                kl=predictions.kl,
                top1=predictions.top1,
                continuations=Continuations.of(continued(model, prompts), beside.goes_on) if prompts else None,
            )
            del model
            gc.collect()


def _quantize(subject: Subject, method: Method, seed: int) -> tuple[Any, float, float]:
    """The quantized model with dense weights, its bits per weight, and the seconds it took."""
    if method.baseline is not None:
        model = subject.load()
        done = simulate(model, subject.inputs(model, seed), method.baseline)
        return model, done.bits_per_weight, done.seconds
    settings: dict[str, Any] = {
        "calibration": subject.calibration(seed),
        "calibration_samples": subject.budget.samples,
        "sequence_length": subject.budget.length,
        "seed": seed,
        "progress": "none",
    }
    changed = {key: value for key, value in settings.items() if key not in (method.settings or {})}
    started = time.perf_counter()
    model = subject.load(quantization_config=method.config(**changed, processor=subject.processor))
    seconds = time.perf_counter() - started
    bits = model.hf_quantizer.report.bits_per_weight
    model.dequantize()  # the same weights, computed with as the dense model's are
    return model, bits, seconds


def _perplexity(subject: Subject, model: Any) -> dict[str, float]:
    return {source: perplexity(model, windows) for source, windows in subject.texts.items()}


def _accuracy(subject: Subject, model: Any) -> dict[str, float]:
    if not subject.questions:
        return {}
    scores = evaluate(model, subject.processor, subject.questions).scores
    return {score.task: score.accuracy for score in scores}
