"""A model continues prompts: sampled, in batches, repeatable, and without a trace in the model or in global state."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optimum_sab.calibration.progress import OnStep, no_step
from optimum_sab.errors import CalibrationError, NonFiniteError, SABError

TOP_P = 0.95
CANDIDATES = 256  # likeliest tokens a choice is made from; the nucleus is rarely larger and never needs more
BATCH = 32
REMEDY = "use calibration='builtin' or give samples of your own"


@dataclass(frozen=True)
class Prompt:
    """What a model is to continue.

    Attributes:
        inputs: forward arguments of one sample, `input_ids` int64 [1, tokens] among them.
        room: how many tokens may follow, at least 1.
        rng: where the choice of tokens comes from, so that it does not hang on who shares the batch.
    """

    inputs: Mapping[str, Any]
    room: int
    rng: random.Random


@dataclass(frozen=True)
class Continuation:
    """What a model wrote.

    Attributes:
        tokens: the ids, an end token last where the model came to one.
        ended: whether it did.
    """

    tokens: tuple[int, ...]
    ended: bool


@dataclass(frozen=True)
class Vocabulary:
    """The ids that mean something to the generation.

    Attributes:
        ends: end tokens; may be empty.
        forbidden: never chosen, such as the placeholders of pictures.
        padding: fills the shorter prompts of a batch.
        size: ids from here on have no text; None if unknown.
    """

    ends: frozenset[int]
    forbidden: frozenset[int]
    padding: int
    size: int | None = None


def read_vocabulary(model: Any, processor: Any) -> Vocabulary:
    """End, forbidden and padding tokens of a model that generates.

    End tokens are the generation config's and the tokenizer's. Every other token that the model's config names (begin,
    padding, placeholders and borders of pictures) is forbidden: the model's forward would look for what it announces.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    config, generation = model.config, model.generation_config
    ends = {*_ids(generation.eos_token_id), *_ids(getattr(tokenizer, "eos_token_id", None))}
    named = [v for k, v in config.to_dict().items() if k.endswith(("_token_id", "_token_index"))]
    named += [generation.bos_token_id, generation.pad_token_id, getattr(processor, "image_token_id", None)]
    own = getattr(tokenizer, "pad_token_id", None)
    padding = [*_ids(own), *_ids(generation.pad_token_id), *sorted(ends), 0][0]
    size = len(tokenizer) if hasattr(tokenizer, "__len__") else None
    return Vocabulary(frozenset(ends), frozenset(i for v in named for i in _ids(v)) - ends, padding, size)


def require_generation(model: Any) -> None:
    """Refuse a model that has no language head to write with, or whose weights are elsewhere.

    Raises:
        CalibrationError: the model cannot generate, or is offloaded.
    """
    if not callable(getattr(model, "generate", None)) or not model.can_generate():
        raise CalibrationError(
            f"{type(model).__name__} cannot generate, so it cannot write its own calibration samples; load the model "
            f"with its language head (AutoModelForCausalLM, AutoModelForImageTextToText), or {REMEDY}."
        )
    offloaded = next((name for name, p in model.named_parameters() if p.device.type == "meta"), None)
    if offloaded is not None:  # hooks could fetch it for every token, but nothing offloaded can be binarized afterwards
        raise CalibrationError(
            f"{offloaded} is offloaded; load the model on one device (device_map='cpu' or 'cuda') for binarization."
        )


@torch.no_grad()
def continue_prompts(
    model: Any, prompts: Sequence[Prompt], vocabulary: Vocabulary, on_step: OnStep = no_step
) -> list[Continuation]:
    """Let the model continue every prompt, at temperature 1 within the likeliest tokens that make up `TOP_P`.

    Prompts of like inputs share a batch, padded on the left. Training mode and generation config are put back, and no
    global random state is used: `generate` runs greedily on logits that leave it a single token.

    Args:
        model: a Transformers model, left on its device.
        prompts: in any order.
        vocabulary: from `read_vocabulary`.
        on_step: told how many prompts are done.

    Raises:
        CalibrationError: the model cannot generate.
        NonFiniteError: its logits hold NaN or inf.
    """
    require_generation(model)
    found: dict[int, Continuation] = {}
    with _prepared(model, vocabulary):
        for batch in _batches(prompts):
            members = [prompts[i] for i in batch]
            found.update(zip(batch, _continue_batch(model, members, vocabulary), strict=True))
            on_step(len(found), len(prompts))
    return [found[i] for i in range(len(prompts))]


def extend_inputs(inputs: Mapping[str, Any], tokens: Sequence[int]) -> dict[str, Any]:
    """A sample's inputs with tokens of text appended; every other per-token input goes on as at its last token."""
    length = inputs["input_ids"].shape[-1]
    added = torch.tensor([list(tokens)], dtype=torch.int64)
    extended: dict[str, Any] = {}
    for name, value in inputs.items():
        if name == "input_ids":
            value = torch.cat([value, added.to(value.device)], dim=1)
        elif _per_token(value, length):
            value = torch.cat([value, value[:, -1:].expand(-1, len(tokens), *value.shape[2:])], dim=1)
        extended[name] = value
    return extended


def cut_inputs(inputs: Mapping[str, Any], length: int) -> dict[str, Any]:
    """A sample's inputs with at most ``length`` tokens; for samples without pictures."""
    tokens = inputs["input_ids"].shape[-1]
    return {name: value[:, :length] if _per_token(value, tokens) else value for name, value in inputs.items()}


def _continue_batch(model: Any, prompts: list[Prompt], vocabulary: Vocabulary) -> list[Continuation]:
    device = next(model.parameters()).device
    inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in _stack(prompts, vocabulary.padding).items()}
    choice = _Choice([p.rng for p in prompts], vocabulary)
    room = max(p.room for p in prompts)
    try:
        output = model.generate(**inputs, max_new_tokens=room, logits_processor=[choice])
    except (SABError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # generation is the model's own code and can fail in any way
        raise CalibrationError(
            f"{type(model).__name__} failed while it wrote calibration samples ({type(error).__name__}: {error}); "
            f"{REMEDY}."
        ) from error
    written = output[:, inputs["input_ids"].shape[1] :].tolist()
    return [_cut(row[: p.room], vocabulary.ends) for row, p in zip(written, prompts, strict=True)]


def _cut(tokens: list[int], ends: frozenset[int]) -> Continuation:
    """Up to and with the first end token: what follows it is padding."""
    stop = next((i for i, token in enumerate(tokens) if token in ends), None)
    return Continuation(tuple(tokens if stop is None else tokens[: stop + 1]), stop is not None)


class _Choice:
    """A logits processor that draws each row's next token and leaves only that one."""

    def __init__(self, rows: list[random.Random], vocabulary: Vocabulary) -> None:
        self._rows = rows
        self._size = vocabulary.size
        self._forbidden = sorted(vocabulary.forbidden)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores float [rows, vocabulary] in and out: 0 at the token drawn, -inf elsewhere."""
        scores = scores.to(torch.float32, copy=True)
        if not bool((scores.amax(dim=1) < torch.inf).all()):  # NaN is not below anything
            raise NonFiniteError(
                "the model's logits hold NaN or inf while it writes calibration samples; the checkpoint is damaged, "
                "or overflows in float16: load it with dtype=torch.bfloat16 or torch.float32."
            )
        width = scores.shape[1]
        scores[:, [i for i in self._forbidden if i < width]] = -torch.inf
        if self._size is not None:
            scores[:, self._size :] = -torch.inf  # rows added to round the embedding up
        best = scores.topk(min(CANDIDATES, width), dim=1)
        shares = (best.values - scores.logsumexp(dim=1, keepdim=True)).exp().cpu()
        summed = shares.cumsum(dim=1)
        kept = (summed - shares) < TOP_P  # the likeliest always is
        mass = (shares * kept).sum(dim=1)
        drawn = torch.tensor([row.random() for row in self._rows]) * mass
        place = torch.minimum((summed <= drawn[:, None]).sum(dim=1), kept.sum(dim=1) - 1)
        token = best.indices.gather(1, place.to(scores.device)[:, None])
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


@contextmanager
def _prepared(model: Any, vocabulary: Vocabulary) -> Iterator[None]:
    """Eval mode, and a generation config with nothing of the model's own, which may ask for beams or penalties."""
    modes: list[tuple[nn.Module, bool]] = [(m, m.training) for m in model.modules()]
    own = model.generation_config
    # Set on the model, not passed: what is passed is filled up with the model's.
    model.generation_config = type(own)(
        do_sample=False,
        use_cache=True,
        bos_token_id=own.bos_token_id,
        eos_token_id=sorted(vocabulary.ends) or None,
        pad_token_id=vocabulary.padding,
    )
    model.eval()
    try:
        yield
    finally:
        model.generation_config = own
        for module, training in modes:
            module.training = training


def _batches(prompts: Sequence[Prompt]) -> Iterator[list[int]]:
    """Indices of prompts that can be stacked, those of like length together."""
    groups: dict[Any, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(_signature(prompt.inputs, index), []).append(index)
    for group in groups.values():
        group.sort(key=lambda i: (prompts[i].inputs["input_ids"].shape[-1], i))
        for start in range(0, len(group), BATCH):
            yield group[start : start + BATCH]


def _signature(inputs: Mapping[str, Any], index: int) -> tuple[Any, ...]:
    """Prompts with equal ones can be stacked; what is no tensor, or has no first dimension, stays alone."""
    length = inputs["input_ids"].shape[-1]
    parts: list[Any] = []
    for name, value in sorted(inputs.items()):
        if not isinstance(value, Tensor) or value.ndim == 0:
            parts.append((name, index))
        elif _per_token(value, length):
            parts.append((name, "token", value.dtype, *value.shape[2:]))
        else:
            parts.append((name, value.dtype, *value.shape[1:]))
    return tuple(parts)


def _stack(prompts: list[Prompt], padding: int) -> dict[str, Any]:
    """One batch: per-token inputs padded on the left, pictures one after the other."""
    lengths = [p.inputs["input_ids"].shape[-1] for p in prompts]
    longest = max(lengths)
    stacked: dict[str, Any] = {}
    for name, first in prompts[0].inputs.items():
        values = [p.inputs[name] for p in prompts]
        if _per_token(first, lengths[0]):
            rows = [
                torch.cat([v.new_full((1, longest - n, *v.shape[2:]), padding if name == "input_ids" else 0), v], dim=1)
                for v, n in zip(values, lengths, strict=True)
            ]
            stacked[name] = torch.cat(rows)
        elif len(values) > 1:
            stacked[name] = torch.cat(values)
        else:
            stacked[name] = first
    if "attention_mask" not in stacked:
        mask = torch.arange(longest)[None] >= longest - torch.tensor(lengths)[:, None]
        stacked["attention_mask"] = mask.long()
    return stacked


def _per_token(value: Any, length: int) -> bool:
    """Whether an input has an entry for every token: ids, masks and types, which are integers; pictures are floats."""
    if not isinstance(value, Tensor) or value.is_floating_point():
        return False
    return value.ndim >= 2 and value.shape[:2] == (1, length)


def _ids(value: Any) -> list[int]:
    """Token ids out of a config entry: one, several, or none; a negative one means none."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= 0]
