"""Tuning of the whole binarized model: its next-token distributions come close to the dense model's.

``KL(teacher ‖ student)`` is minimised over the scales of all packed linears and the norms and biases of the decoder,
with the signs frozen. The teacher needs no second model: what the dense stream gave to the output embedding is kept
from the calibration, and the embedding makes the logits again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optimum_sab.calibration.predictions.divergence import divergence
from optimum_sab.calibration.progress import OnStep, no_step
from optimum_sab.calibration.ranks import Ranks
from optimum_sab.calibration.refine.holdout import split_samples
from optimum_sab.calibration.refine.parameters import copied, restore
from optimum_sab.calibration.refine.reconstruction import BETAS, cosine
from optimum_sab.calibration.refine.student import Student
from optimum_sab.calibration.refine.sums import add_up_gradients, mean_of_all, of_all
from optimum_sab.calibration.refine.tuning_store import TuningStore
from optimum_sab.calibration.samples.modality import TokenModalities

RATE = 0.003  # of parameters that are about 1
BATCH = 4  # samples per step
JUDGEMENTS = 10  # how often in all the held-out samples are looked at
SAVE_EVERY = 20  # steps


@dataclass(frozen=True)
class Tuning:
    """What came of it.

    Attributes:
        before: mean KL divergence per token, in nats, on the samples that judge, at the start.
        after: the same of what was kept.
        improved: whether anything beat the start; if not, the start was kept.
    """

    before: float
    after: float
    improved: bool


@dataclass(frozen=True)
class TuningSample:
    """One calibration sample.

    Attributes:
        inputs: forward arguments.
        teacher: what the dense stream gave to the output embedding, [1, tokens, width].
        modalities: of its tokens; only those of text are judged, since nobody reads what a model predicts for the
            next piece of a picture.
    """

    inputs: Mapping[str, Any]
    teacher: Tensor
    modalities: TokenModalities

    @property
    def counted(self) -> Tensor:
        """Which tokens are judged, bool [tokens]."""
        return self.modalities.judged(self.teacher.shape[-2])


def tune(
    student: Student,
    samples: Mapping[int, TuningSample],
    steps: int,
    store: TuningStore | None = None,
    on_step: OnStep = no_step,
    ranks: Ranks | None = None,
) -> Tuning:
    """Train the student's parameters in place and leave the best in them.

    Args:
        student: of a model in eval mode, the same on every rank.
        samples: what it is trained on, this rank's by their index; a tenth of all only judges.
        steps: of Adam, its rate falling along half a cosine.
        store: keeps the state every `SAVE_EVERY` steps, and gives back that of an interrupted run.
        on_step: told after every step.
        ranks: who shares the samples; None for this process alone.
    """
    ranks = ranks or Ranks()
    tokens = of_all(ranks, "tokens to tune to", {i: int(each.counted.sum()) for i, each in samples.items()})
    order = list(tokens)
    split = split_samples(len(order))
    train, judge = ([order[i] for i in some] for some in (split.train, split.judge))
    tensors = [t for tuned in student.tuned for t in tuned.parameters.tensors]
    optimizer = torch.optim.Adam(tensors, lr=RATE, betas=BETAS)

    def error_now() -> float:
        return mean_of_all(ranks, "divergences", _divergences_of(student, [samples[i] for i in judge if i in samples]))

    with student.prepared():
        state = None if store is None else store.load()
        if state is None:
            first, before = 0, error_now()
            best, kept = before, copied(tensors)
        else:
            first, before, best, kept = _unpack(state, tensors, optimizer)
        for step in range(first, steps):
            optimizer.param_groups[0]["lr"] = RATE * cosine(step, steps)
            optimizer.zero_grad()
            batch = _batch(train, step)
            _gradients(student, [samples[i] for i in batch if i in samples], sum(tokens[i] for i in batch))
            add_up_gradients(ranks, tensors)
            optimizer.step()
            if (step + 1) % max(1, steps // JUDGEMENTS) == 0 or step + 1 == steps:
                error = error_now()
                if error < best:
                    best, kept = error, copied(tensors)
            if store is not None and ((step + 1) % SAVE_EVERY == 0 or step + 1 == steps):
                store.save(*_pack(step + 1, before, best, tensors, kept, optimizer))
            on_step(step + 1, steps)
        restore(tensors, kept)
    for tensor in tensors:
        tensor.grad = None
    return Tuning(before, best, best < before)


def _batch(train: Sequence[int], step: int) -> list[int]:
    """Indices of a step's samples: epoch after epoch, each in an order of its own that only the epoch decides."""
    per_epoch = -(-len(train) // BATCH)
    epoch, place = divmod(step, per_epoch)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(epoch)).tolist()
    return [train[i] for i in order[place * BATCH : (place + 1) * BATCH]]


@torch.enable_grad()
def _gradients(student: Student, samples: Sequence[TuningSample], tokens: int) -> None:
    """Add the gradients of these samples' divergences, over the ``tokens`` of a step."""
    for stack in _stacks(samples):
        (_divergences(student, stack).sum() / tokens).backward()


@torch.no_grad()
def _divergences_of(student: Student, samples: Sequence[TuningSample]) -> list[Tensor]:
    return [_divergences(student, stack) for stack in _stacks(samples)]


def _divergences(student: Student, stack: Sequence[TuningSample]) -> Tensor:
    """KL of every counted token."""
    inputs = stack[0].inputs
    if len(stack) > 1:
        inputs = {name: torch.cat([s.inputs[name] for s in stack]) for name in inputs}
    counted = torch.stack([s.counted for s in stack])
    teacher = torch.cat([s.teacher for s in stack])
    mine, wanted = student.logits(inputs, teacher[counted.to(teacher.device)][None], counted)
    return divergence(mine[0], wanted[0])


def _stacks(samples: Sequence[TuningSample], size: int = BATCH) -> list[list[TuningSample]]:
    """Samples that can go through the model as one batch: those of text alone and of equal length."""
    groups: dict[Any, list[TuningSample]] = {}
    for index, sample in enumerate(samples):
        shape = (1, sample.teacher.shape[-2])
        plain = all(
            isinstance(v, Tensor) and v.shape == shape and not v.is_floating_point() for v in sample.inputs.values()
        )
        groups.setdefault((*sample.inputs, shape) if plain else index, []).append(sample)
    return [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]


def _pack(
    step: int,
    before: float,
    best: float,
    tensors: Sequence[Tensor],
    kept: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    packed: dict[str, Tensor] = {}
    for i, (tensor, best_of) in enumerate(zip(tensors, kept, strict=True)):
        packed |= {f"{i}.value": tensor.detach(), f"{i}.kept": best_of}
        # an expert that no token has chosen so far has no moments
        packed |= {f"{i}.{key}": value for key, value in optimizer.state.get(tensor, {}).items()}
    return packed, {"step": step, "before": before, "best": best}


def _unpack(
    state: tuple[dict[str, Tensor], dict[str, float]], tensors: Sequence[Tensor], optimizer: torch.optim.Optimizer
) -> tuple[int, float, float, list[Tensor]]:
    packed, numbers = state
    kept = [packed[f"{i}.kept"].to(t.device) for i, t in enumerate(tensors)]
    restore(tensors, [packed[f"{i}.value"] for i in range(len(tensors))])
    for i, tensor in enumerate(tensors):
        if f"{i}.step" in packed:
            moments = {key: packed[f"{i}.{key}"].to(tensor.device) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[tensor] = {"step": packed[f"{i}.step"], **moments}
    return int(numbers["step"]), numbers["before"], numbers["best"], kept
