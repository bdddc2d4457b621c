"""First stage of the example's training: teaching the vision tower to see, before it has to talk.

A linear layer on top of the tower's sixteen tokens names the contents of all nine cells of a scene, or the digits of a
sign. Such dense answers teach a small tower in minutes what single words through the decoder would teach in hours. The
linear layer is thrown away afterwards.
"""

import itertools
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import ProcessorMixin, Qwen2_5_VLForConditionalGeneration

from optimum_sab.data.documents import number_sign
from optimum_sab.data.documents import render as render_document
from optimum_sab.data.scenes import COLOURS, GRID, KINDS, Scene
from optimum_sab.data.scenes import render as render_scene
from optimum_sab.example.tasks import IMAGE_SIZE, training_number, training_scene

MAX_DIGITS = 3
CLASSES = max(len(COLOURS) + 1, len(KINDS) + 1, 11)
SCENE_SLOTS = 2 * GRID * GRID
IGNORED = -100


@dataclass(frozen=True)
class SightSettings:
    """How long to train the tower, and on how many pictures of each sort in a step."""

    steps: int = 600
    scenes: int = 32
    signs: int = 32
    learning_rate: float = 1.5e-3
    seed: int = 0


@dataclass(frozen=True)
class SightBatch:
    """Processed pictures and what is in their slots, [pictures, SCENE_SLOTS + MAX_DIGITS]; `IGNORED` where nothing is."""

    pixel_values: Tensor
    image_grid_thw: Tensor
    targets: Tensor


class SightHead(nn.Module):
    """Linear classifier of every slot from all tokens of a picture."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(tokens * width)
        self.linear = nn.Linear(tokens * width, (SCENE_SLOTS + MAX_DIGITS) * CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [pictures, slots, CLASSES] from tokens [pictures, tokens, width]."""
        return self.linear(self.norm(tokens.flatten(1))).unflatten(1, (-1, CLASSES))


def teach_sight(
    model: Qwen2_5_VLForConditionalGeneration,
    processor: ProcessorMixin,
    settings: SightSettings,
    report: Callable[[str], None] = print,
) -> None:
    """Train the vision tower of `model` in place.

    Args:
        model: the model; its decoder stays as it is.
        processor: its processor.
        settings: how long and on what.
        report: called with a line of progress every fifty steps.
    """
    visual = model.model.visual
    stream = sight_batches(processor, settings)
    head = SightHead(tokens=16, width=visual.config.out_hidden_size)
    optimizer = torch.optim.AdamW(
        [*visual.parameters(), *head.parameters()], lr=settings.learning_rate, weight_decay=0.05, fused=True
    )
    warmup = min(100, settings.steps // 4)
    began, running = time.monotonic(), 0.0
    for step, batch in zip(range(1, settings.steps + 1), stream):
        factor = min(step / warmup, 1.05 - step / settings.steps)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * factor
        with torch.autocast("cpu", dtype=torch.bfloat16):
            tokens = model.get_image_features(batch.pixel_values, batch.image_grid_thw).pooler_output
            logits = head(torch.stack(tuple(tokens)))
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        running += loss.item()
        if step % 50 == 0:
            right = (logits.argmax(-1) == batch.targets)[settings.scenes :, SCENE_SLOTS:].float().mean()
            elapsed = time.monotonic() - began
            report(f"sight {step:5d}  loss {running / 50:.4f}  digits {right:.2f}  {elapsed:6.0f} s")
            running = 0.0


def sight_batches(processor: ProcessorMixin, settings: SightSettings) -> Iterator[SightBatch]:
    """The endless stream of pictures with everything that is in them."""
    rng = random.Random(f"sight {settings.seed}")
    while True:
        scenes = [training_scene(rng) for _ in range(settings.scenes)]
        numbers = [training_number(rng) for _ in range(settings.signs)]
        images = [render_scene(scene, IMAGE_SIZE) for scene in scenes]
        images += [render_document(number_sign(number, rng), IMAGE_SIZE) for number in numbers]
        targets = [scene_slots(scene) + [IGNORED] * MAX_DIGITS for scene in scenes]
        targets += [[IGNORED] * SCENE_SLOTS + digit_slots(number) for number in numbers]
        inputs = processor.image_processor(images, return_tensors="pt")
        yield SightBatch(inputs["pixel_values"], inputs["image_grid_thw"], torch.tensor(targets))


def scene_slots(scene: Scene) -> list[int]:
    """Colour and kind of every cell in reading order, counted from 1; 0 for an empty cell."""
    cells = {(shape.row, shape.column): shape for shape in scene.shapes}
    slots = []
    for place in itertools.product(range(GRID), range(GRID)):
        shape = cells.get(place)
        slots.append(0 if shape is None else 1 + COLOURS.index(shape.colour))
        slots.append(0 if shape is None else 1 + KINDS.index(shape.kind))
    return slots


def digit_slots(number: int) -> list[int]:
    """The digits from the left, counted from 1; 0 where the number is shorter than `MAX_DIGITS`."""
    digits = [1 + int(digit) for digit in str(number)]
    return digits + [0] * (MAX_DIGITS - len(digits))
