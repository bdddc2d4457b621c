"""A model to quantize, what to calibrate it on, and what to ask of it."""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from optimum_sab.calibration.samples.encoding import encode_samples
from optimum_sab.calibration.samples.inputs import SampleSource, calibration_inputs
from optimum_sab.data.builtin import builtin_samples
from optimum_sab.data.unseen import UNSEEN_SEED
from optimum_sab.errors import ConfigError
from optimum_sab.eval.reader.architecture import MARK
from optimum_sab.eval.reader.tasks import READER_TASKS, reader_chats, reader_questions
from optimum_sab.eval.text import MIXED, SOURCES, mixed_windows, text_windows
from optimum_sab.example import EXAMPLE, checkpoint_path
from optimum_sab.example import MARK as EXAMPLE_MARK
from optimum_sab.example.evaluation import answered_messages
from optimum_sab.example.tasks import TASKS, Question, held_out_questions, training_questions
from optimum_sab.hf.load import auto_class, model_config, reads_pictures
from optimum_sab.hf.origin import Origin
from optimum_sab.hf.processor import load_processor


@dataclass(frozen=True)
class Budget:
    """How much of everything.

    Attributes:
        samples: calibration samples at most.
        length: calibration tokens per text.
        held_out: windows of ``window`` tokens per held-out text.
        window: tokens of a held-out window.
        questions: per task.
        probes: inputs on which predictions and layers are compared with the dense model's.
        continuations: prompts to go on from greedily, beside the dense model.
    """

    samples: int = 64
    length: int = 512
    held_out: int = 24
    window: int = 512
    questions: int = 100
    probes: int = 8
    continuations: int = 0


@dataclass(frozen=True)
class Subject:
    """What `quality` needs to know of a model.

    Attributes:
        name: for titles.
        origin: of the checkpoint.
        processor: its processor or tokenizer.
        dtype: everything runs in it.
        calibration: seed → samples, in any form `read_samples` takes.
        budget: how much of everything.
        texts: held-out windows [count, length] by source.
        questions: held-out questions, of any tasks.
        probes: forward keyword arguments, one sample each.
    """

    name: str
    origin: Origin
    processor: Any
    dtype: torch.dtype
    calibration: Callable[[int], Any]
    budget: Budget
    texts: Mapping[str, Tensor] = field(default_factory=dict)
    questions: tuple[Question, ...] = ()
    probes: tuple[dict[str, Any], ...] = ()

    def load(self, **options: Any) -> Any:
        """The model; ``quantization_config`` among the options quantizes it."""
        name, reached = self.origin.name, self.origin.arguments
        factory = auto_class(model_config(name, **reached))
        model = factory.from_pretrained(name, dtype=self.dtype, **reached, **options)
        return model.eval()

    def inputs(self, model: Any, seed: int) -> list[dict[str, Any]]:
        """Calibration samples as inputs of the dense model, the same that `SABConfig` makes."""
        budget = self.budget
        source = SampleSource(self.calibration(seed), budget.samples, budget.length, seed)
        return calibration_inputs(model, self.processor, source)


def find_subject(
    model: str | os.PathLike[str] | Origin,
    calibration: str | None,
    budget: Budget,
    dtype: torch.dtype = torch.float32,
    cifar: Path | str | None = None,
) -> Subject:
    """The subject for a checkpoint, by what it is.

    Args:
        model: "example" for the embedded model, or a checkpoint: a folder, a Hub repository, or where exactly it is.
        calibration: for a language model "mixed" (default), "reference" or "passages"; for the embedded example and
            the reader "tasks" (pictures and questions of the evaluation's kind) or "mixed" (those and the built-in
            set in turns); for any model what `SABConfig` takes ("builtin", "self", a file, a dataset).
        budget: how much of everything.
        dtype: of the model.
        cifar: folder of CIFAR-10, for the reader's second task (`optimum_sab.eval.reader`).

    Raises:
        ConfigError: no model can be read, the calibration does not go with it, or ``cifar`` is given without use.
    """
    origin = model if isinstance(model, Origin) else Origin(os.fspath(model))
    if origin.name == EXAMPLE:
        return _example(Origin(str(checkpoint_path())), "embedded example", calibration, budget, dtype)
    config = model_config(origin.name, **origin.arguments)
    if getattr(config, EXAMPLE_MARK, False):
        return _example(origin, "example's tasks", calibration, budget, dtype)
    if getattr(config, MARK, False):
        return _reader(origin, calibration, budget, dtype, cifar)
    if cifar is not None:
        raise ConfigError(f"cifar={str(cifar)!r} is for the reader only, and {origin.name} is none.")
    if reads_pictures(config):
        return _vision_language(origin, calibration, budget, dtype)
    return _language(origin, calibration or MIXED, budget, dtype)


def _language(origin: Origin, calibration: str, budget: Budget, dtype: torch.dtype) -> Subject:
    tokenizer = AutoTokenizer.from_pretrained(origin.name, **origin.arguments)

    def windows(seed: int) -> list[str]:
        drawn = mixed_windows(tokenizer, calibration, "calibration", budget.samples, budget.length, seed)
        return [tokenizer.decode(window) for window in drawn]

    own = calibration in (MIXED, *SOURCES)
    texts = _held_out_texts(tokenizer, budget)
    probes = [w for s in SOURCES for w in texts[s][: max(1, budget.probes // len(SOURCES))]]
    return Subject(
        name=Path(origin.name).name,
        origin=origin,
        processor=tokenizer,
        dtype=dtype,
        calibration=windows if own else lambda seed: calibration,
        budget=budget,
        texts=texts,
        probes=tuple({"input_ids": window[None]} for window in probes),
    )


def _example(origin: Origin, name: str, calibration: str | None, budget: Budget, dtype: torch.dtype) -> Subject:
    processor = load_processor(origin.name, **origin.arguments)

    def own(seed: int) -> list[list[dict[str, Any]]]:
        each = -(-budget.samples // len(TASKS))
        drawn = [q for task in TASKS for q in training_questions(task, each, seed)]
        random.Random(seed).shuffle(drawn)
        return [answered_messages(question) for question in drawn[: budget.samples]]

    subject = Subject(
        name=name,
        origin=origin,
        processor=processor,
        dtype=dtype,
        calibration=_calibration(calibration, own, budget),
        budget=budget,
    )
    return _asked(subject, TASKS, held_out_questions)


def _reader(
    origin: Origin, calibration: str | None, budget: Budget, dtype: torch.dtype, cifar: Path | str | None
) -> Subject:
    processor = load_processor(origin.name, **origin.arguments)
    tasks = READER_TASKS if cifar is not None else READER_TASKS[:1]

    def own(seed: int) -> list[list[dict[str, Any]]]:
        return reader_chats(budget.samples, seed, cifar)

    subject = Subject(
        name="reader",
        origin=origin,
        processor=processor,
        dtype=dtype,
        calibration=_calibration(calibration, own, budget),
        budget=budget,
        texts=_held_out_texts(processor.tokenizer, budget),
    )
    return _asked(subject, tasks, functools.partial(reader_questions, cifar=cifar))


def _asked(subject: Subject, tasks: Sequence[str], ask: Callable[[str, int, int], list[Question]]) -> Subject:
    """A subject with questions of its tasks, and as probes other questions with their answers."""
    budget = subject.budget
    questions = [question for task in tasks for question in ask(task, budget.questions, 0)]
    each = -(-budget.probes // len(tasks))
    chats = [answered_messages(question) for task in tasks for question in ask(task, each, 1)]
    probes = encode_samples(chats, subject.processor, budget.length)
    return replace(subject, questions=tuple(questions), probes=tuple(probes))


def _held_out_texts(tokenizer: Any, budget: Budget) -> dict[str, Tensor]:
    return {s: text_windows(tokenizer, s, "held-out", budget.held_out, budget.window) for s in SOURCES}


def _calibration(source: str | None, own: Callable[[int], list[Any]], budget: Budget) -> Callable[[int], Any]:
    """Where the samples of a model with tasks come from: seed → samples."""

    def mixed(seed: int) -> list[Any]:
        pairs = zip(own(seed), builtin_samples(budget.samples, seed), strict=True)
        return [sample for pair in pairs for sample in pair][: budget.samples]

    return {"tasks": own, MIXED: mixed}.get(source or "", lambda seed: source)


def _vision_language(origin: Origin, calibration: str | None, budget: Budget, dtype: torch.dtype) -> Subject:
    """Any vision-language model: text for its perplexity, built-in pictures with answers for its predictions."""
    processor = load_processor(origin.name, **origin.arguments)
    tokenizer = processor.tokenizer
    texts = _held_out_texts(tokenizer, budget)
    return Subject(
        name=Path(origin.name).name,
        origin=origin,
        processor=processor,
        dtype=dtype,
        calibration=lambda seed: calibration,
        budget=budget,
        texts=texts,
        probes=tuple(encode_samples(builtin_samples(budget.probes, UNSEEN_SEED), processor, budget.length)),
    )
