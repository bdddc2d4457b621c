"""How a quantized model goes on by itself: low bits can keep likelihood and fail at generating."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import Any

import torch
from torch import Tensor

from optimum_sab.errors import ConfigError

PROMPT = 32  # tokens of a held-out text that are gone on from
TOKENS = 64
NGRAM = 4
AT_ONCE = 16


@dataclass(frozen=True)
class Continuations:
    """Greedy continuations of `TOKENS` tokens, or to where a model stops, against the dense model's.

    Attributes:
        followed: mean number of tokens up to the first that is another than the dense model's, over `TOKENS`.
        same: share of continuations that are the dense model's from end to end.
        repeated: share of runs of `NGRAM` tokens that a continuation had before.
    """

    followed: float
    same: float
    repeated: float

    @classmethod
    def of(cls, found: Sequence[Sequence[int]], dense: Sequence[Sequence[int]]) -> Continuations:
        """From the tokens of both.

        Raises:
            ConfigError: there are none.
        """
        if not found:
            raise ConfigError("there is no prompt to go on from; ask for more held-out windows or probes.")
        pairs = list(zip(found, dense, strict=True))
        runs = [tuple(each[i : i + NGRAM]) for each in found for i in range(len(each) - NGRAM + 1)]
        first = sum(len({tuple(each[i : i + NGRAM]) for i in range(len(each) - NGRAM + 1)}) for each in found)
        return cls(
            followed=sum(map(_common, found, dense)) / (TOKENS * len(pairs)),
            same=sum(list(one) == list(other) for one, other in pairs) / len(pairs),
            repeated=1.0 - first / len(runs) if runs else 0.0,
        )


def prompts_of(texts: Mapping[str, Tensor], probes: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """Inputs to go on from: pieces of held-out text of all sources in turn, or probes where there is no text.

    Args:
        texts: windows [count, length] by source.
        probes: keyword arguments of a forward, one sample each.
        count: how many; fewer where there are not so many.
    """
    pieces = [windows.flatten().split(2 * PROMPT) for windows in texts.values()]
    starts = [piece[None, :PROMPT] for turn in zip_longest(*pieces) for piece in turn if piece is not None]
    inputs = [{"input_ids": start} for start in starts if start.shape[1] == PROMPT]
    return list(islice(inputs or probes, count))


@torch.inference_mode()
def continued(model: Any, prompts: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Greedy continuations of prompts, up to the token that ends a text.

    Args:
        model: with `generate`.
        prompts: keyword arguments of its forward, one sample each.
    """
    found = []
    for batch in _batches(prompts):
        length = batch["input_ids"].shape[1]
        output = model.generate(**batch, max_new_tokens=TOKENS, do_sample=False, num_beams=1, pad_token_id=0)
        found += [_to_end(row[length:].tolist(), model) for row in output]
    return found


def _batches(prompts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Texts of one length together, everything else alone."""
    if all(set(prompt) == {"input_ids"} for prompt in prompts) and len({p["input_ids"].shape for p in prompts}) == 1:
        rows = torch.cat([prompt["input_ids"] for prompt in prompts])
        return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in rows.split(AT_ONCE)]
    return [dict(prompt) for prompt in prompts]


def _to_end(tokens: list[int], model: Any) -> list[int]:
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens) - 1)
    return tokens[: stop + 1]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens up to the first that differs; `TOKENS` where both are the same and stopped before."""
    if list(one) == list(other):
        return TOKENS
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
