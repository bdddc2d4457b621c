"""The built-in calibration set: drawn scenes and documents with questions and answers, and passages of our own.

Nothing is downloaded, and equal seeds give equal samples. Half of the samples show a picture, because a model whose
Hessians never saw image tokens is binarized for text alone.
"""

from __future__ import annotations

import random

from optimum_sab.data import documents, scenes
from optimum_sab.data.chat import Message, Turn, chat_messages
from optimum_sab.data.passages import text_samples
from optimum_sab.data.questions import SCENE_TASKS, scene_turns
from optimum_sab.errors import ConfigError
from optimum_sab.presets import MOST_BUILTIN

IMAGE_SIZE = 336


def builtin_samples(
    count: int, seed: int = 0, visual: bool = True, image_size: int = IMAGE_SIZE, words: int = 400
) -> list[str | list[Message]]:
    """Calibration samples in a fixed rotation: a scene, a text, a document, a chat about a text.

    Args:
        count: number of samples.
        seed: seed of every choice.
        visual: whether the model reads pictures; without, all samples are texts.
        image_size: side of the pictures in pixels, before the model's own processor resizes them.
        words: about how long a text is.

    Returns:
        Plain strings and chat conversations in the processors' message format.

    Raises:
        ConfigError: ``count`` is not from 1 to `MOST_BUILTIN`.
    """
    if not 1 <= count <= MOST_BUILTIN:
        raise ConfigError(
            f"calibration_samples={count} must be from 1 to {MOST_BUILTIN} with the built-in set, drawn at once; it "
            "holds little that is new beyond; bring data of your own for more (calibration=...)."
        )
    texts = iter(text_samples(count, seed=seed, words=words))
    if not visual:
        return list(texts)
    rng = random.Random(f"built-in calibration {seed}")
    samples: list[str | list[Message]] = []
    for index in range(count):
        if index % 4 == 0:
            samples.append(_scene_chat(rng, image_size))
        elif index % 4 == 1:
            samples.append(next(texts))
        elif index % 4 == 2:
            samples.append(_document_chat(rng, image_size))
        else:
            samples.append(_text_chat(rng))
    return samples


def _scene_chat(rng: random.Random, size: int) -> list[Message]:
    scene = scenes.random_scene(rng)
    turns = [turn for task in SCENE_TASKS for turn in scene_turns(task, scene)]
    rng.shuffle(turns)
    asked = [*turns[:5], Turn("Describe the picture.", scenes.describe_scene(scene))]
    return chat_messages(asked, scenes.render(scene, size))


def _document_chat(rng: random.Random, size: int) -> list[Message]:
    document = documents.random_document(rng)
    turns = list(document.questions)
    rng.shuffle(turns)
    return chat_messages([*turns[:4], Turn("Read everything.", document.text)], documents.render(document, size))


def _text_chat(rng: random.Random) -> list[Message]:
    """Questions about what a document says, its text given instead of its picture."""
    document = documents.random_document(rng)
    turns = list(document.questions)
    rng.shuffle(turns)
    first, *others = turns[:4]
    return chat_messages([Turn(f"{document.text}\n\n{first.prompt}", first.answer), *others])
