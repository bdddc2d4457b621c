"""The optimizers and the loop of every training here: steps along a schedule, lines of progress, saves."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Outcome:
    """What a model made of a batch.

    Attributes:
        loss: scalar, with a gradient.
        right: which answers were right, by what they were about; booleans of any shape.
    """

    loss: Tensor
    right: Mapping[str, Tensor] = field(default_factory=dict)


def make_optimizers(module: nn.Module, learning_rate: float, weight_decay: float) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices inside the layers, experts' too, AdamW for embeddings, convolutions, norms and biases.

    Muon's updates are scaled to the size of AdamW's, so one learning rate serves both. It reaches the same loss in a
    fraction of AdamW's steps here.

    Args:
        module: what to train; parameters without gradient are left out.
        learning_rate: of both optimizers.
        weight_decay: of the matrices; nothing else decays.
    """
    embeddings = {id(each.weight) for each in module.modules() if isinstance(each, nn.Embedding)}
    trained = [each for each in module.parameters() if each.requires_grad]
    matrices = [each for each in trained if each.ndim == 2 and id(each) not in embeddings]
    stacks = [each for each in trained if each.ndim == 3]
    others = [each for each in trained if each.ndim not in (2, 3) or id(each) in embeddings]
    muon = partial(torch.optim.Muon, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    return (muon(matrices), adamw, *([StackOptimizer(stacks, muon)] if stacks else []))


class StackOptimizer(torch.optim.Optimizer):
    """An optimizer of matrices for parameters that stack them, as those of experts do.

    Args:
        stacks: parameters, [count, out, in] each.
        of_matrices: makes the optimizer of the matrices, which share the stacks' memory.
    """

    def __init__(
        self, stacks: Sequence[nn.Parameter], of_matrices: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    ) -> None:
        super().__init__(stacks, {})
        self._matrices = [[nn.Parameter(matrix) for matrix in stack.detach()] for stack in stacks]
        self._inner = of_matrices([matrix for matrices in self._matrices for matrix in matrices])

    def step(self) -> None:  # type: ignore[override]  # no closure is called here
        """One step with the learning rate of this optimizer's only group, where that has been set."""
        [group] = self.param_groups
        for inner in self._inner.param_groups:
            inner["lr"] = group.get("lr", inner["lr"])
        for stack, matrices in zip(group["params"], self._matrices, strict=True):
            for index, matrix in enumerate(matrices):
                matrix.grad = None if stack.grad is None else stack.grad[index]
        self._inner.step()


def write_line(line: str) -> None:
    """Write a line of progress to standard output at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


@dataclass(frozen=True)
class Journal:
    """What is written down of a training while it runs.

    Attributes:
        name: begins every line of progress.
        report: called with a line of progress: the loss and what share was right since the line before.
        report_every: steps between lines.
        save: called at times and after the last step; None to keep nothing.
        save_every: steps between saves.
    """

    name: str
    report: Callable[[str], None] = write_line
    report_every: int = 50
    save: Callable[[], None] | None = None
    save_every: int = 100


def optimize(
    journal: Journal,
    outcome_of: Callable[[Batch], Outcome],
    batches: Iterable[Batch],
    optimizers: Sequence[torch.optim.Optimizer],
    rates: Sequence[float],
    clipped: Sequence[nn.Parameter] = (),
) -> None:
    """Take one step for each learning rate.

    Args:
        journal: what is reported and saved on the way.
        outcome_of: runs the model on a batch.
        batches: what it runs on; as many are drawn as there are steps.
        optimizers: of all that is trained.
        rates: the learning rate of every step.
        clipped: parameters whose gradient, taken as one vector, is clipped to length 1.
    """
    began, loss, shares = time.monotonic(), 0.0, defaultdict[str, float](float)
    for step, (rate, batch) in enumerate(zip(rates, batches), 1):
        _set_learning_rate(optimizers, rate)
        outcome = outcome_of(batch)
        for optimizer in optimizers:
            optimizer.zero_grad()
        outcome.loss.backward()
        if clipped:
            nn.utils.clip_grad_norm_(clipped, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        loss += outcome.loss.item()
        for about, marks in outcome.right.items():
            shares[about] += marks.float().mean().item()
        if step % journal.report_every == 0:
            parts = [f"loss {loss / journal.report_every:.4f}"]
            parts += [f"{about} {share / journal.report_every:.3f}" for about, share in shares.items()]
            journal.report(f"{journal.name} {step:5d}  {'  '.join(parts)}  {time.monotonic() - began:6.0f} s")
            loss = 0.0
            shares.clear()
        if journal.save is not None and (step % journal.save_every == 0 or step == len(rates)):
            journal.save()


def _set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], learning_rate: float) -> None:
    """Use `learning_rate` from the next step on."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
