"""The constant part of the image tokens: a prompt in embedding space that makes the frozen model answer from a caption.

Asked "What does the sign say?" after the bare words of a sign, a small language model chats about the words. What is
learnt here are 61 vectors in front of the caption, prompt tuning in the sense of Lester et al. (2021), started from the
embeddings of written instructions. The tower then learns to emit them. As they are the same for every picture, their
keys and values are computed once per step.
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from optimum_sab.eval.reader.answers import answer_loss, answered_rows, token_ids
from optimum_sab.eval.reader.cifar import CLASSES
from optimum_sab.eval.reader.sight import CAPTION_TOKENS, NOTHING
from optimum_sab.eval.reader.signs import random_words
from optimum_sab.eval.reader.tasks import NAMING_PROMPTS, READING_PROMPTS
from optimum_sab.eval.reader.tower import TOKENS
from optimum_sab.example.optimization import set_learning_rate
from optimum_sab.hf.compat import CACHE_ARGUMENT

if TYPE_CHECKING:
    from jaxtyping import Float

PROMPT_TOKENS = TOKENS - CAPTION_TOKENS
INSTRUCTION = (
    "Answer with the caption only, word for word, and nothing else.\n"
    "Caption: red hat box\nAnswer: red hat box\nCaption: dog\nAnswer: dog\nCaption: cup tree\nAnswer: cup tree\n"
    "Caption: truck\nAnswer: truck\nCaption:"
)


@dataclass(frozen=True)
class PromptSettings:
    """How long to tune, on how many captions in a step, and how inexact they are.

    Attributes:
        steps: number of optimizer steps.
        captions: of either task in a step.
        learning_rate: Adam's, falling linearly.
        noise: length of the error added to a caption's embeddings, relative to theirs, up to this.
        seed: of the captions.
    """

    steps: int = 150
    captions: int = 8
    learning_rate: float = 5e-3
    noise: float = 0.6
    seed: int = 0


def written_prompt(tokenizer: Any, embeddings: Tensor) -> Float[Tensor, "61 hidden"]:
    """The embeddings of `INSTRUCTION`, filled up at the front with line breaks or cut there."""
    ids = token_ids(tokenizer, INSTRUCTION)
    filling = token_ids(tokenizer, NOTHING)[-1:]
    ids = [*filling * (PROMPT_TOKENS - len(ids)), *ids][-PROMPT_TOKENS:]
    return embeddings[ids].detach().float().clone()


def tune_prompt(
    model: Any,
    tokenizer: Any,
    prompt: Tensor,
    settings: PromptSettings,
    before: str,
    after: Callable[[str], str],
    report: Callable[[str], None] = print,
) -> Tensor:
    """Tune the prompt through the frozen language model.

    Args:
        model: the language model, in any dtype; its weights stay.
        tokenizer: its tokenizer.
        prompt: where to start, float32 [61, hidden].
        settings: how long and on what.
        before: the chat's text before the picture.
        after: a question → the chat's text after the picture, up to where the answer begins.
        report: called with a line of progress every ten steps.

    Returns:
        The tuned prompt, float32 [61, hidden].
    """
    model.requires_grad_(False)
    prompt = nn.Parameter(prompt.clone())
    optimizer = torch.optim.Adam([prompt], lr=settings.learning_rate, betas=(0.9, 0.95))
    rng, began, losses, right = random.Random(f"prompt {settings.seed}"), time.monotonic(), 0.0, 0.0
    for step in range(1, settings.steps + 1):
        set_learning_rate([optimizer], settings.learning_rate * min(step / 10, 1.05 - step / settings.steps))
        drawn = [_reading(rng) for _ in range(settings.captions)] + [_naming(rng) for _ in range(settings.captions)]
        loss, exact = _prompt_loss(model, tokenizer, prompt, drawn, settings.noise, before, after)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses, right = losses + loss.item(), right + exact
        if step % 10 == 0:
            elapsed = time.monotonic() - began
            report(f"prompt {step:4d}  loss {losses / 10:.4f}  exact {right / 10:.3f}  {elapsed:5.0f} s")
            losses, right = 0.0, 0.0
    return prompt.detach()


def _reading(rng: random.Random) -> tuple[str, str, str]:
    words = " ".join(random_words(rng, reserved=False))
    return f" {words}", rng.choice(READING_PROMPTS), words


def _naming(rng: random.Random) -> tuple[str, str, str]:
    name = rng.choice(CLASSES)
    return f" {name}", rng.choice(NAMING_PROMPTS), name


def _prompt_loss(
    model: Any,
    tokenizer: Any,
    prompt: Tensor,
    drawn: list[tuple[str, str, str]],
    noise: float,
    before: str,
    after: Callable[[str], str],
) -> tuple[Tensor, float]:
    """Cross-entropy of the answers' tokens, and the share of answers that are right token by token."""
    encode = functools.partial(token_ids, tokenizer)
    table = model.get_input_embeddings()
    nothing = encode(NOTHING)[-1]
    captions = [encode(caption) for caption, _, _ in drawn]
    captions = [[*ids, *[nothing] * (CAPTION_TOKENS - len(ids))] for ids in captions]
    starts = [[*c, *encode(after(question))] for c, (_, question, _) in zip(captions, drawn, strict=True)]
    rows = answered_rows(starts, [encode(answer) for _, _, answer in drawn], tokenizer.eos_token_id)
    embedded = table(rows.ids).detach().clone()
    exact = embedded[:, :CAPTION_TOKENS].float()
    error = nn.functional.normalize(torch.randn_like(exact), dim=-1) * exact.norm(dim=-1, keepdim=True)
    embedded[:, :CAPTION_TOKENS] = (exact + noise * torch.rand(len(drawn), 1, 1) * error).to(embedded.dtype)
    prefix = torch.cat([table(torch.tensor([encode(before)])), prompt[None].to(embedded.dtype)], dim=1)
    cache = DynamicCache()
    cached = {CACHE_ARGUMENT: cache, "use_cache": True}
    model(inputs_embeds=prefix, logits_to_keep=1, **cached)
    cache.batch_repeat_interleave(len(drawn))
    hidden = model.model(inputs_embeds=embedded, **cached).last_hidden_state
    loss, hits = answer_loss(model, hidden, rows)
    return loss, float(hits.float().mean())
