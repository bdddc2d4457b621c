"""The script that trained the embedded example: `python -m optimum_sab.example.training --output DIR`.

It builds a Qwen2.5-VL of about six million parameters and a byte-level tokenizer from nothing, draws an endless
stream of conversations (see `tasks`), and trains on the answers only. One CPU thread is enough. Needs Transformers 5.

How the shipped checkpoint came about, in 33 minutes on one core: from seed 0, 1200 steps of the first stage
(sight), 1600 steps of the second with 10 scenes, 5 signs and 8 texts in a step and four unrelated texts in a
conversation; then 1200 further steps as the script stands now, from other data (``--initial FIRST --sight-steps 0
--seed 1 --steps 1200``).
Sums in bfloat16 depend on the processor, so a rerun gives a model as good, not the same bits.
"""

import argparse
import math
import pathlib
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import ProcessorMixin, Qwen2_5_VLForConditionalGeneration

from optimum_sab.example.acceleration import accelerate
from optimum_sab.example.architecture import TURN_END, TURN_START, build_model, save_model
from optimum_sab.example.optimization import make_optimizers, set_learning_rate
from optimum_sab.example.sight import SightSettings, teach_sight
from optimum_sab.example.tasks import Conversation, training_conversation
from optimum_sab.example.tokenization import prose_passages, tokenizer_texts, write_processor
from optimum_sab.hf.processor import load_processor


@dataclass(frozen=True)
class TrainingSettings:
    """How long, how fast and on what to train.

    Attributes:
        steps: number of optimizer steps.
        scenes: conversations about scenes in a step.
        signs: conversations about signs in a step.
        texts: conversations without a picture in a step.
        prose: passages of ordinary English in a step.
        length: tokens in a row; longer rows are cut.
        prose_weight: weight of a token of prose in the loss; a token of an answer weighs 1.
        learning_rate: peak of the cosine schedule.
        warmup: steps of linear warm-up.
        weight_decay: Muon's, on the matrices inside the layers.
        seed: seed of weights and data.
    """

    steps: int = 1600
    scenes: int = 8
    signs: int = 4
    texts: int = 11
    prose: int = 1
    length: int = 176
    prose_weight: float = 0.1
    learning_rate: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.05
    seed: int = 0


@dataclass(frozen=True)
class Batch:
    """Model inputs and the weight of every token in the loss, [batch, length]; 0 for what is not learnt."""

    inputs: dict[str, Tensor]
    loss_weight: Tensor


def messages(conversation: Conversation) -> list[dict[str, object]]:
    """The conversation in the chat format of Transformers; the picture stands before the first prompt."""
    chat: list[dict[str, object]] = []
    for turn in conversation.turns:
        content: list[dict[str, object]] = [{"type": "text", "text": turn.prompt}]
        if conversation.image is not None and not chat:
            content.insert(0, {"type": "image", "image": conversation.image})
        chat.append({"role": "user", "content": content})
        chat.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    return chat


def answer_mask(input_ids: Tensor, processor: ProcessorMixin) -> Tensor:
    """Which tokens belong to an assistant's answer, its closing token included.

    Args:
        input_ids: token ids, [batch, length].
        processor: the processor that made them.

    Returns:
        Booleans, [batch, length].
    """
    opening = processor.tokenizer.encode(f"{TURN_START}assistant\n", add_special_tokens=False)
    closing = processor.tokenizer.convert_tokens_to_ids(TURN_END)
    begins = torch.zeros_like(input_ids, dtype=torch.bool)
    windows = input_ids.unfold(1, len(opening), 1)
    begins[:, len(opening) :] = (windows == torch.tensor(opening)).all(-1)[:, :-1]
    closed_before = (input_ids == closing).long().cumsum(1) - (input_ids == closing).long()
    opened = begins.long().cumsum(1)
    latest = torch.where(begins, closed_before, 0).cummax(1).values
    return (opened > 0) & (closed_before == latest)


def batches(processor: ProcessorMixin, settings: TrainingSettings) -> Iterator[Batch]:
    """The endless training stream."""
    rng = random.Random(f"training {settings.seed}")
    passages = prose_passages(rng)
    subjects = ["scene"] * settings.scenes + ["sign"] * settings.signs + ["text"] * settings.texts
    while True:
        conversations = [training_conversation(rng, subject) for subject in subjects]
        texts = [processor.apply_chat_template(messages(each), tokenize=False) for each in conversations]
        texts += [next(passages) for _ in range(settings.prose)]
        inputs = processor(
            text=texts,
            images=[each.image for each in conversations if each.image is not None],
            padding="max_length",
            truncation=True,
            max_length=settings.length,
            return_tensors="pt",
        )
        weight = answer_mask(inputs["input_ids"], processor).float()
        weight[len(conversations) :] = settings.prose_weight
        yield Batch(inputs=dict(inputs), loss_weight=weight * inputs["attention_mask"])


def weighted_loss(model: Qwen2_5_VLForConditionalGeneration, batch: Batch) -> Tensor:
    """Mean cross-entropy of the next token over the tokens that count; logits are made for those only."""
    hidden = model.model(**batch.inputs, use_cache=False).last_hidden_state[:, :-1]
    weight, target = batch.loss_weight[:, 1:], batch.inputs["input_ids"][:, 1:]
    counts = weight > 0
    logits = model.lm_head(hidden[counts]).float()
    losses = torch.nn.functional.cross_entropy(logits, target[counts], reduction="none")
    return (losses * weight[counts]).sum() / weight.sum()


def train(
    model: Qwen2_5_VLForConditionalGeneration,
    processor: ProcessorMixin,
    settings: TrainingSettings,
    output: pathlib.Path,
    save_every: int,
) -> None:
    """Train the decoder in bfloat16 arithmetic on float32 weights.

    The vision tower stays as the first stage left it: while the decoder cannot read the pictures yet, its gradients are
    noise that would undo what the tower has learnt.

    Args:
        model: the model, its tower taught by `teach_sight`.
        processor: its processor.
        settings: how long, how fast and on what.
        output: folder of the checkpoint.
        save_every: steps between saves; the last step saves as well.
    """
    model.model.visual.requires_grad_(False)
    optimizers = make_optimizers(model, settings.learning_rate, settings.weight_decay)
    stream = batches(processor, settings)
    began, running = time.monotonic(), 0.0
    for step in range(1, settings.steps + 1):
        set_learning_rate(optimizers, settings.learning_rate * schedule(step, settings))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = weighted_loss(model, next(stream))
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        running += loss.item()
        if step % 50 == 0:
            print(f"step {step:5d}  loss {running / 50:.4f}  {time.monotonic() - began:6.0f} s", flush=True)
            running = 0.0
        if step % save_every == 0 or step == settings.steps:
            save_model(model, output)


def schedule(step: int, settings: TrainingSettings) -> float:
    """Factor on the learning rate: linear warm-up, then a cosine down to one hundredth."""
    if step <= settings.warmup:
        return step / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))


def main() -> None:
    defaults = TrainingSettings()
    parser = argparse.ArgumentParser(description="Train the embedded example model.")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--sight-steps", type=int, default=SightSettings().steps, help="steps of the first stage")
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    parser.add_argument("--initial", type=pathlib.Path, help="checkpoint to continue from; by default a new model")
    parser.add_argument("--save-every", type=int, default=500)
    arguments = parser.parse_args()
    settings = TrainingSettings(seed=arguments.seed, steps=arguments.steps, learning_rate=arguments.learning_rate)
    torch.manual_seed(settings.seed)
    torch.set_num_threads(1)
    model = build_model()
    if arguments.initial is None:
        write_processor(arguments.output, tokenizer_texts(settings.seed))
    else:
        shutil.copytree(arguments.initial, arguments.output, dirs_exist_ok=True)
        model.load_state_dict(Qwen2_5_VLForConditionalGeneration.from_pretrained(arguments.initial).state_dict())
    processor = load_processor(arguments.output)
    model.train()
    accelerate(model)
    print(f"{sum(each.numel() for each in model.parameters()):,} parameters", flush=True)
    if arguments.sight_steps > 0:
        teach_sight(model, processor, SightSettings(seed=arguments.seed, steps=arguments.sight_steps))
        save_model(model, arguments.output)
    train(model, processor, settings, arguments.output, arguments.save_every)


if __name__ == "__main__":
    main()
