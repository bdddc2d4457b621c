"""First stage of the training: the tower and the connector learn to caption, without the language model.

The last three of a picture's 64 tokens are made to be the language model's own embeddings of what the picture shows: a
sign's words, or the name of what is pictured, and a line break where there is no word left. The other tokens become
constant vectors, a prompt in the language model's own space that says what to do with the caption. So this stage needs
the embeddings only. Helpers look at hidden states on the way, and are dropped afterwards: every patch names the letter
on it after two layers and the word on it after four, and the mean of all patches what is pictured.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from optimum_sab.eval.reader.cifar import CLASSES, Pictures
from optimum_sab.eval.reader.signs import WORDS, Sign, draw_sign, random_words
from optimum_sab.eval.reader.tower import GRID, IMAGE_SIZE, NEIGHBOUR_LAYERS, PATCH_SIZE, TOKENS, WIDTH
from optimum_sab.example.learning_rate import linear_rates
from optimum_sab.example.optimization import Journal, Outcome, make_optimizers, optimize, write_line

if TYPE_CHECKING:
    from jaxtyping import Float, Int64

CAPTION_TOKENS = 3
NOTHING = "\n"
CANDIDATES: tuple[str, ...] = (NOTHING, *(f" {name}" for name in dict.fromkeys((*WORDS, *CLASSES))))
TEMPERATURE = 0.05
LETTERS = 26
LETTER_LAYERS = 2  # after which the letters should be known


@dataclass(frozen=True)
class SightSettings:
    """How long to train, and on how many pictures of each sort in a step."""

    steps: int = 900
    signs: int = 72
    pictures: int = 56
    learning_rate: float = 2e-3
    warmup: int = 60
    prompt_weight: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class SightBatch:
    """Pictures and what they show; signs come first.

    Attributes:
        pixels: float32 [batch, 3, 64, 64], -1 to 1.
        captions: index into `CANDIDATES` of every caption token.
        words: for the signs, index into `CANDIDATES` of the word on every patch, 0 for none.
        letters: likewise the letter's place in the alphabet, 0 for none.
        labels: for the others, index into `CLASSES`.
    """

    pixels: Float[Tensor, "batch 3 height width"]
    captions: Int64[Tensor, "batch 3"]
    words: Int64[Tensor, "signs 64"]
    letters: Int64[Tensor, "signs 64"]
    labels: Int64[Tensor, "pictures"]


@dataclass(frozen=True)
class Goal:
    """What the connector should emit, in the space of the language model's embeddings.

    Attributes:
        embeddings: of `CANDIDATES`, float32 [candidates, hidden].
        prompt: the constant tokens before the caption, float32 [61, hidden], None to leave them free.
        prompt_weight: of their squared error, relative to the embeddings' mean square.
    """

    embeddings: Float[Tensor, "candidates hidden"]
    prompt: Float[Tensor, "61 hidden"] | None = None
    prompt_weight: float = 1.0


class Sight(nn.Module):
    """Tower, connector and the two helpers."""

    tower: Any  # a module; Any because modules' attributes are untyped
    connector: Any

    def __init__(self, tower: nn.Module, connector: nn.Module) -> None:
        super().__init__()
        self.tower = getattr(tower, "vision_model", tower)  # Transformers 4 wraps it once more
        self.connector = connector
        self.letter_head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 1 + LETTERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.word_head = nn.Linear(WIDTH, len(CANDIDATES))
        self.picture_head = nn.Linear(WIDTH, len(CLASSES))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The hidden states after the second layer, in the middle (normed) and at the end, all [batch, 64, width]."""
        embeddings = self.tower.embeddings
        weight = embeddings.patch_embedding.weight.flatten(1)  # the kernel covers a patch: a linear map
        hidden = nn.functional.linear(flat_patches(pixels), weight, embeddings.patch_embedding.bias)
        hidden = hidden + embeddings.position_embedding.weight
        early = middle = hidden
        for index, layer in enumerate(self.tower.encoder.layers):
            hidden = layer(hidden, None)
            if index == LETTER_LAYERS - 1:
                early = hidden
            if index == NEIGHBOUR_LAYERS - 1:
                middle = hidden
        return early, self.norm(middle), hidden


def flat_patches(pixels: Tensor) -> Tensor:
    """Pixels [batch, 3, 64, 64] as patches [batch, 64, 192], in the order of a convolution's kernel."""
    cut = pixels.unflatten(3, (GRID, PATCH_SIZE)).unflatten(2, (GRID, PATCH_SIZE))
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(len(pixels), TOKENS, -1)


def sight_batches(pictures: Pictures, settings: SightSettings) -> Iterator[SightBatch]:
    """The endless stream of signs and pictures; the pictures are flipped and moved by up to three pixels."""
    rng = random.Random(f"sight {settings.seed}")
    generator = np.random.default_rng(settings.seed)
    index = {word: number for number, word in enumerate(CANDIDATES)}
    names = torch.tensor([index[f" {name}"] for name in CLASSES])
    order = _endless_order(len(pictures.labels), generator)
    while True:
        signs = [draw_sign(random_words(rng, reserved=False), rng) for _ in range(settings.signs)]
        captions = torch.zeros(settings.signs + settings.pictures, CAPTION_TOKENS, dtype=torch.int64)
        for row, sign in zip(captions, signs, strict=False):
            row[: len(sign.words)] = torch.tensor([index[f" {word}"] for word in sign.words])
        chosen = np.fromiter((next(order) for _ in range(settings.pictures)), dtype=np.int64)
        labels = torch.from_numpy(pictures.labels[chosen])
        captions[settings.signs :, 0] = names[labels]
        drawn = torch.from_numpy(np.stack([np.asarray(sign.image) for sign in signs])).permute(0, 3, 1, 2)
        seen = torch.from_numpy(_moved(pictures.pixels[chosen], generator)).permute(0, 3, 1, 2)
        pixels = torch.cat([drawn.float(), enlarged(seen)]) / 127.5 - 1
        words, letters = zip(*(_covered(sign, index) for sign in signs), strict=True)
        yield SightBatch(pixels, captions, torch.stack(words), torch.stack(letters), labels)


def enlarged(pixels: Tensor) -> Tensor:
    """Pictures [batch, 3, 32, 32] as the image processor resizes them, values 0 to 255 as float32."""
    size = (IMAGE_SIZE, IMAGE_SIZE)
    large = nn.functional.interpolate(pixels.float(), size, mode="bicubic", antialias=True)  # Pillow's bicubic
    return large.round().clamp(0, 255)


def sight_loss(sight: Sight, batch: SightBatch, goal: Goal) -> tuple[Tensor, Tensor]:
    """The loss, and which captions are right, booleans [batch].

    Args:
        sight: what is trained.
        batch: what it sees.
        goal: what it should make of that.
    """
    with torch.autocast("cpu", dtype=torch.bfloat16):
        early, middle, hidden = sight(batch.pixels)
        caption = sight.connector(hidden[:, -CAPTION_TOKENS:]).float()
        letters = sight.letter_head(early[: len(batch.letters)]).float()
        words = sight.word_head(middle[: len(batch.words)]).float()
        named = sight.picture_head(middle[len(batch.words) :].mean(1)).float()
    power = goal.embeddings.square().mean()
    directions = nn.functional.normalize(goal.embeddings, dim=-1)
    logits = nn.functional.normalize(caption, dim=-1) @ directions.T / TEMPERATURE
    cross_entropy = nn.functional.cross_entropy
    loss = CAPTION_TOKENS * cross_entropy(logits.flatten(0, 1), batch.captions.flatten())
    loss = loss + 0.5 * (caption - goal.embeddings[batch.captions]).square().mean() / power
    loss = loss + _patch_loss(letters, batch.letters) + _patch_loss(words, batch.words)
    loss = loss + 0.5 * cross_entropy(named, batch.labels)
    if goal.prompt is not None:
        with torch.autocast("cpu", dtype=torch.bfloat16):  # on an eighth of the batch: it is the same for every picture
            constant = sight.connector(hidden[::8, :-CAPTION_TOKENS]).float()
        error = (constant - goal.prompt).square().mean()
        loss = loss + goal.prompt_weight * error / power
    return loss, (logits.argmax(-1) == batch.captions).all(-1)


def teach_sight(
    sight: Sight,
    pictures: Pictures,
    goal: Goal,
    settings: SightSettings,
    report: Callable[[str], None] = write_line,
    save: Callable[[], None] | None = None,
) -> None:
    """Train in place, in bfloat16 arithmetic on float32 weights.

    Args:
        sight: tower, connector and helpers.
        pictures: CIFAR-10's training half.
        goal: what the connector should emit.
        settings: how long and on what.
        report: called with a line of progress every fifty steps.
        save: called every hundred steps and at the end.
    """

    def look(batch: SightBatch) -> Outcome:
        loss, hits = sight_loss(sight, batch, goal)
        return Outcome(loss, {"signs": hits[: settings.signs], "pictures": hits[settings.signs :]})

    optimize(
        Journal("sight", report, save=save),
        look,
        sight_batches(pictures, settings),
        make_optimizers(sight, settings.learning_rate, weight_decay=0.05),
        linear_rates(settings.learning_rate, settings.steps, settings.warmup, last=0.02),
    )


def _endless_order(count: int, generator: np.random.Generator) -> Iterator[int]:
    while True:
        yield from generator.permutation(count)


def _moved(pixels: np.ndarray, generator: np.random.Generator, reach: int = 3) -> np.ndarray:
    padded = np.pad(pixels, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="reflect")
    side, moved = pixels.shape[1], np.empty_like(pixels)
    for number, picture in enumerate(padded):
        top, left = generator.integers(0, 2 * reach + 1, 2)
        cut = picture[top : top + side, left : left + side]
        moved[number] = cut[:, ::-1] if generator.random() < 0.5 else cut
    return moved


def _patch_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy over the patches with something on them, and with a tenth of the weight over the empty ones."""
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    covered = labels.flatten() > 0
    return losses[covered].mean() + 0.1 * losses[~covered].mean()


def _covered(sign: Sign, index: dict[str, int]) -> tuple[Tensor, Tensor]:
    """The word and the letter on every patch whose middle lies in a letter's box, each int64 [64]."""
    words, letters = torch.zeros(2, GRID, GRID, dtype=torch.int64)
    middles = (torch.arange(GRID) + 0.5) * PATCH_SIZE
    for word, edges, (top, bottom) in zip(sign.words, sign.letters, sign.lines, strict=True):
        down = (middles > top) & (middles <= bottom)
        for letter, left, right in zip(word, edges, edges[1:], strict=False):
            box = down[:, None] & (middles > left) & (middles <= right)
            words[box] = index[f" {word}"]
            letters[box] = ord(letter) - ord("a") + 1
    return words.flatten(), letters.flatten()
