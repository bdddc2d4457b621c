"""Let the model write to a few prompts, before the work and after it."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from optimum_sab.calibration.progress import OnStep
from optimum_sab.calibration.rehearsal import random_state_kept
from optimum_sab.calibration.run import Run
from optimum_sab.calibration.samples.continuation import Prompt, continue_prompts
from optimum_sab.calibration.samples.prompts import ExamplePrompt, example_prompts
from optimum_sab.calibration.samples.vocabulary import read_vocabulary
from optimum_sab.calibration.stage import Stage
from optimum_sab.calibration.streams.modes import modules_kept
from optimum_sab.errors import warn
from optimum_sab.nn.streamed import streamed_blocks

NEW_TOKENS = 32


@dataclass(frozen=True)
class Example:
    """One prompt and what came of it.

    Attributes:
        kind: "text" or "pictures".
        prompt: in words.
        expected: how the text goes on, or the right answer.
        picture: PNG in base64; empty without one.
        dense: what the dense model wrote, greedily.
        packed: what the finished one wrote.
    """

    kind: str
    prompt: str
    expected: str
    picture: str
    dense: str
    packed: str


@dataclass(frozen=True)
class DenseExamples:
    """What the dense model wrote.

    Attributes:
        prompts: what it was asked.
        written: its answers, one each.
    """

    prompts: Sequence[ExamplePrompt]
    written: Sequence[str]


class WriteBefore(Stage):
    """Leaves `DenseExamples`, where the model can write. Reports why it cannot, else nothing.

    A model whose weights are streamed does not: all of them would be read for every token.
    """

    name: ClassVar[str] = "dense examples"
    title: ClassVar[str] = "Writing examples"
    unit: ClassVar[str] = "example"
    by: ClassVar[int | None] = 1

    def wanted(self, run: Run) -> bool:
        return run.options.examples

    def apply(self, run: Run, on_step: OnStep) -> str | None:
        reason = _cannot_write(run.model) or _reads_for_every_token(run.model)
        if reason is not None:
            return reason
        try:
            prompts = example_prompts(run.model, run.processor)
            run.keep(DenseExamples(prompts, _written(run, prompts, on_step)))
        except Exception as error:  # generation is the model's own code, and the model can be binarized all the same
            warn(f"the report will not show what the model says: the dense one does not write to its prompts ({error})")
            return str(error)
        return None


class WriteAfter(Stage):
    """Reports the examples. The finished model computes with the kernels it will have."""

    name: ClassVar[str] = "examples"
    title: ClassVar[str] = "Writing examples again"
    unit: ClassVar[str] = "example"
    by: ClassVar[int | None] = 1

    def wanted(self, run: Run) -> bool:
        return run.kept(DenseExamples) is not None

    def apply(self, run: Run, on_step: OnStep) -> tuple[Example, ...] | None:
        before = run.kept(DenseExamples)
        assert before is not None
        try:
            written = _written(run, before.prompts, on_step)
        except Exception as error:  # the finished model must not be lost to that
            warn(f"the report will not show what the model says: the finished one does not write ({error})")
            return None
        return tuple(
            Example(p.kind, p.prompt, p.expected, _png(p.picture), dense, packed)
            for p, dense, packed in zip(before.prompts, before.written, written, strict=True)
        )


def _cannot_write(model: Any) -> str | None:
    """Why a model has nothing to write with; None where it has."""
    if not callable(getattr(model, "generate", None)) or not model.can_generate():
        return f"{type(model).__name__} cannot generate"
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return (
            f"{type(model).__name__} answers in a decoder of its own, and is given no question that it was trained on"
        )
    return None


def _reads_for_every_token(model: Any) -> str | None:
    """Why a model that could write does not."""
    if not streamed_blocks(model):
        return None
    return "stream_weights is on, and a dense model that writes would read all its weights from disk for every token"


def _written(run: Run, prompts: Sequence[ExamplePrompt], on_step: OnStep) -> list[str]:
    vocabulary = read_vocabulary(run.model, run.processor)
    tokenizer = getattr(run.processor, "tokenizer", run.processor)
    asked = [Prompt(each.inputs, NEW_TOKENS, None) for each in prompts]
    with random_state_kept(), modules_kept(run.model):
        answers = continue_prompts(run.model, asked, vocabulary, on_step)
    words = [[token for token in each.tokens if token not in vocabulary.ends] for each in answers]
    return [str(tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in words]


def _png(picture: Any) -> str:
    if picture is None:
        return ""
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")
