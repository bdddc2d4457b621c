"""A model continues prompts: sampled or greedily, in batches, repeatable, without a trace in it or in global state."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optimum_sab.calibration.progress import OnStep, no_step
from optimum_sab.calibration.samples.token_inputs import stack_inputs, stacking_key
from optimum_sab.calibration.samples.vocabulary import Vocabulary
from optimum_sab.calibration.streams.placement import map_tensors
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
        rng: where the choice of tokens comes from, so that it does not hang on who shares the batch; None takes the
            likeliest token every time.
    """

    inputs: Mapping[str, Any]
    room: int
    rng: random.Random | None


@dataclass(frozen=True)
class Continuation:
    """What a model wrote.

    Attributes:
        tokens: the ids, an end token last where the model came to one.
        ended: whether it did.
    """

    tokens: tuple[int, ...]
    ended: bool


def require_language_head(model: Any) -> None:
    """Refuse a model that has no language head to write with.

    Raises:
        CalibrationError: the model cannot generate.
    """
    if not callable(getattr(model, "generate", None)) or not model.can_generate():
        raise CalibrationError(
            f"{type(model).__name__} cannot generate, so it cannot write its own calibration samples; load the model "
            f"with its language head (AutoModelForCausalLM, AutoModelForImageTextToText), or {REMEDY}."
        )


def require_generation(model: Any) -> None:
    """Refuse a model that cannot write as it is.

    Raises:
        CalibrationError: see `require_language_head`, or the model is offloaded.
    """
    require_language_head(model)
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


def _continue_batch(model: Any, prompts: list[Prompt], vocabulary: Vocabulary) -> list[Continuation]:
    device = next(model.parameters()).device
    inputs = map_tensors(stack_inputs([p.inputs for p in prompts], vocabulary.padding), device)
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

    def __init__(self, rows: list[random.Random | None], vocabulary: Vocabulary) -> None:
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
        drawn = torch.tensor([0.0 if row is None else row.random() for row in self._rows]) * mass
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
        groups.setdefault(stacking_key(prompt.inputs, index), []).append(index)
    for group in groups.values():
        group.sort(key=lambda i: (prompts[i].inputs["input_ids"].shape[-1], i))
        for start in range(0, len(group), BATCH):
            yield group[start : start + BATCH]
