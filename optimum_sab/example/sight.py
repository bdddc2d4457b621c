"""First stage of the example's training: teaching the vision tower to see, before it has to talk.

Nine of a picture's sixteen tokens are made to look like words: the token of a grid cell like the words for what is in
the cell and where it is, the token of a column of a sign like its digit. The words are the decoder's own embeddings, so
what the decoder learns about words serves it for pictures too. Such dense answers teach a small tower in minutes what
single answers through the decoder would teach in hours.
"""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from optimum_sab.data.documents import number_sign
from optimum_sab.data.documents import render as render_document
from optimum_sab.data.scenes import GRID, PLACES, Scene
from optimum_sab.data.scenes import render as render_scene
from optimum_sab.example.chatml import token_ids
from optimum_sab.example.learning_rate import linear_rates
from optimum_sab.example.optimization import Journal, Outcome, make_optimizers, optimize, write_line
from optimum_sab.example.tasks import IMAGE_SIZE, NOTHING, training_number, training_scene

TOKENS_ACROSS = 4
CELL_TOKENS = [row * TOKENS_ACROSS + column for row in range(GRID) for column in range(GRID)]


@dataclass(frozen=True)
class SightSettings:
    """How long to train the tower, and on how many pictures of each sort in a step."""

    steps: int = 1200
    scenes: int = 32
    signs: int = 32
    learning_rate: float = 2e-3
    seed: int = 0


@dataclass(frozen=True)
class SightBatch:
    """Processed pictures, and for every cell a distribution over words, [pictures, cells, vocabulary]."""

    pixel_values: Tensor
    image_grid_thw: Tensor
    words: Tensor


def teach_sight(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    settings: SightSettings,
    report: Callable[[str], None] = write_line,
) -> None:
    """Train the vision tower of `model` in place.

    Args:
        model: the model; its decoder and its embeddings stay as they are.
        processor: its processor.
        settings: how long and on what.
        report: called with a line of progress every fifty steps.
    """
    visual = model.model.visual
    directions = nn.functional.normalize(model.get_input_embeddings().weight.detach(), dim=-1)
    optimizers = make_optimizers(visual, settings.learning_rate, weight_decay=0.05)
    tokens: Tensor

    def look(batch: SightBatch) -> Outcome:
        nonlocal tokens
        with torch.autocast("cpu", dtype=torch.bfloat16):
            tokens = torch.stack(model.get_image_features(batch.pixel_values, batch.image_grid_thw).pooler_output)
        seen = nn.functional.rms_norm(tokens[:, CELL_TOKENS].float(), tokens.shape[-1:])
        logits = seen @ directions.T
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch.words.flatten(0, 1))
        right = recognized(logits, batch.words > 0)
        return Outcome(loss, {"cells": right[: settings.scenes], "digits": right[settings.scenes :]})

    rates = linear_rates(settings.learning_rate, settings.steps, min(100, settings.steps // 4), last=0.05)
    optimize(Journal("sight", report), look, sight_batches(processor, settings), optimizers, rates)
    _match_scale(model, tokens.detach().float())


def recognized(logits: Tensor, words: Tensor) -> Tensor:
    """Whether the words of a cell, and no others, are its likeliest.

    Args:
        logits: [..., vocabulary].
        words: booleans, [..., vocabulary].

    Returns:
        Booleans, [...].
    """
    least = logits.masked_fill(~words, math.inf).amin(-1)
    most = logits.masked_fill(words, -math.inf).amax(-1)
    return least > most


def sight_batches(processor: ProcessorMixin, settings: SightSettings) -> Iterator[SightBatch]:
    """The endless stream of pictures with the words for everything that is in them."""
    rng = random.Random(f"sight {settings.seed}")
    while True:
        scenes = [training_scene(rng) for _ in range(settings.scenes)]
        numbers = [training_number(rng) for _ in range(settings.signs)]
        images = [render_scene(scene, IMAGE_SIZE) for scene in scenes]
        images += [render_document(number_sign(number, rng), IMAGE_SIZE) for number in numbers]
        words = [*map(scene_words, scenes), *map(number_words, numbers)]
        inputs = processor.image_processor(images, return_tensors="pt")
        yield SightBatch(
            pixel_values=inputs["pixel_values"],
            image_grid_thw=inputs["image_grid_thw"],
            words=torch.stack([_distributions(each, processor.tokenizer) for each in words]),
        )


def scene_words(scene: Scene) -> list[list[str]]:
    """The words of every cell in reading order: colour, kind and place, or that there is nothing, and place."""
    found = {shape.place: [shape.colour, shape.kind, shape.place] for shape in scene.shapes}
    return [found.get(place, [NOTHING, place]) for row in PLACES for place in row]


def number_words(number: int) -> list[list[str]]:
    """The words of every cell of a sign: the digits from the left, the same in each row of cells."""
    digits = [[digit] for digit in str(number)]
    return (digits + [[NOTHING]] * (GRID - len(digits))) * GRID


@torch.no_grad()
def _match_scale(model: PreTrainedModel, tokens: Tensor) -> None:
    """Scale the tower's output to that of the embeddings, which the loss above leaves open."""
    factor = model.get_input_embeddings().weight.square().mean().sqrt() / tokens.square().mean().sqrt()
    merger = model.model.visual.merger
    last = merger.mlp[-1] if hasattr(merger, "mlp") else merger.linear_fc2
    last.weight.mul_(factor)
    last.bias.mul_(factor)


def _distributions(cells: list[list[str]], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """For every cell equal probabilities for the tokens of its words, [cells, vocabulary]."""
    target = torch.zeros(len(cells), len(tokenizer))
    for row, words in zip(target, cells, strict=True):
        tokens = [token for word in words for token in token_ids(tokenizer, word)]
        row[tokens] = 1.0
    return target / target.sum(-1, keepdim=True)
