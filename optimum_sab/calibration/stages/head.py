"""Find the output embedding and the norm before it, and who has to come there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from optimum_sab.calibration.options import RunOptions
from optimum_sab.calibration.predictions.head import output_embedding
from optimum_sab.calibration.predictions.last_norm import LastNorm, find_last_norm
from optimum_sab.calibration.progress import OnStep
from optimum_sab.calibration.refine.whole_model import head_to_tune_to
from optimum_sab.calibration.run import Run
from optimum_sab.calibration.samples.calibration_samples import CalibrationSamples
from optimum_sab.calibration.stage import Stage
from optimum_sab.calibration.streams.arrival import DENSE, QUANTIZED, Worker
from optimum_sab.core.spread import spread
from optimum_sab.errors import CalibrationError, warn

TEMPERATURE_SAMPLES = 32  # by which the temperature is fitted, at most


@dataclass(frozen=True)
class Head:
    """Where predictions are made.

    Attributes:
        embedding: the output embedding; None without one.
        last_norm: the norm before it; None without one, or where no temperature is wanted.
        awaited: samples and streams whose way there is wanted by the stages behind the blocks.
    """

    embedding: nn.Module | None
    last_norm: LastNorm | None
    awaited: tuple[Worker, ...]


class FindHead(Stage):
    """Leaves the `Head`. A model that cannot be handled there is refused now, before the work."""

    name: ClassVar[str] = "head"

    def check(self, model: nn.Module, options: RunOptions) -> None:
        if options.tuned:
            head_to_tune_to(model)

    def apply(self, run: Run, on_step: OnStep) -> None:
        samples, options = run.samples, run.options
        embedding = head_to_tune_to(run.model) if options.tuned else output_embedding(run.model)
        last = None
        if options.temperature_scaling and run.two_streams and embedding is not None:
            last = _last_norm(run.model, embedding, samples)
        scaled = [] if last is None else spread(len(samples), TEMPERATURE_SAMPLES)
        dense = range(len(samples)) if options.tuned else scaled
        run.keep(Head(embedding, last, (*((i, DENSE) for i in dense), *((i, QUANTIZED) for i in scaled))))


def _last_norm(model: nn.Module, embedding: nn.Module, samples: CalibrationSamples) -> LastNorm | None:
    """The norm before the embedding; None, with a word, where it is not found."""
    reason = ""
    for carrier in _carriers(samples):
        try:
            found = find_last_norm(model, embedding, carrier)
        except CalibrationError as error:
            reason = str(error)
            continue
        if found is not None:
            return found
        reason = "no norm of it gives the output embedding its input"
        break
    warn(f"the temperature of {type(model).__name__}'s predictions is not fitted: {reason}.")
    return None


def _carriers(samples: CalibrationSamples) -> Iterator[Mapping[str, Any]]:
    """Forward arguments that carry a forward to the embedding, the shortest first: one token, or a whole sample."""
    first, modalities = samples.inputs[0], samples.modalities[0]
    if "input_ids" in first:
        place = int(modalities.text.to(torch.int64).argmax())
        yield {"input_ids": first["input_ids"][:, place : place + 1]}
    yield samples.inputs[min(range(len(samples)), key=lambda index: samples.modalities[index].labels.numel())]
