"""Find the output embedding and the norm before it, and who has to come there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from optimum_sab.calibration.options import RunOptions
from optimum_sab.calibration.predictions.head import output_embedding
from optimum_sab.calibration.predictions.last_norm import LastNorm, find_last_norm
from optimum_sab.calibration.progress import OnStep
from optimum_sab.calibration.refine.whole_model import head_to_tune_to
from optimum_sab.calibration.run import Run
from optimum_sab.calibration.samples.modality import TokenModalities
from optimum_sab.calibration.samples.spread import spread
from optimum_sab.calibration.stage import Stage
from optimum_sab.calibration.streams.visitor import DENSE, QUANTIZED, Worker

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
        first = samples.inputs[0]
        if options.temperature_scaling and run.two_streams and embedding is not None and "input_ids" in first:
            last = find_last_norm(run.model, embedding, _one_token(first, samples.modalities[0]))
        scaled = [] if last is None else spread(len(samples), TEMPERATURE_SAMPLES)
        dense = range(len(samples)) if options.tuned else scaled
        run.keep(Head(embedding, last, (*((i, DENSE) for i in dense), *((i, QUANTIZED) for i in scaled))))


def _one_token(sample: Mapping[str, Any], modalities: TokenModalities) -> dict[str, Tensor]:
    """The sample's first text token as forward arguments."""
    first = int(modalities.text.to(torch.int64).argmax())
    return {"input_ids": sample["input_ids"][:, first : first + 1]}
