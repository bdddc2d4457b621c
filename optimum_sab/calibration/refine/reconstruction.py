"""Block-output reconstruction: a binarized block learns to give the dense stream's output from its own stream's input.

With the signs frozen, Adam moves the block's scales, norms and biases. A tenth of the samples decides which state is
kept, the start among them, so that on those the block never gets worse.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from optimum_sab.calibration.ranks import Ranks
from optimum_sab.calibration.refine.hidden_error import hidden_error
from optimum_sab.calibration.refine.holdout import split_samples
from optimum_sab.calibration.refine.parameters import ModuleParameters, copied, restore
from optimum_sab.calibration.refine.sums import add_up_gradients, mean_of_all, of_all
from optimum_sab.calibration.streams.passage import BlockPassage, hidden_states
from optimum_sab.errors import CalibrationError

RATE = 0.01  # of parameters that are about 1
BATCH = 4  # samples per step
BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Reconstruction:
    """What came of one block.

    Attributes:
        before: mean relative squared error of its output per token on the samples that judge, at the start.
        after: the same of what was kept.
        improved: whether anything beat the start; if not, the start was kept.
    """

    before: float
    after: float
    improved: bool


def reconstruct(
    passage: BlockPassage, parameters: ModuleParameters, epochs: int, seed: int = 0, ranks: Ranks | None = None
) -> Reconstruction | None:
    """Train ``parameters`` of the passage's block in place and leave the best in them.

    Args:
        passage: of two streams, with this rank's samples.
        parameters: of ``passage.block``, the same on every rank.
        epochs: rounds over the samples.
        seed: of the order of the samples.
        ranks: who shares the samples; None for this process alone.

    Returns:
        None where no sample of any rank came to the block.

    Raises:
        CalibrationError: the passage has one stream only.
    """
    ranks = ranks or Ranks()
    tokens = of_all(ranks, "tokens in a block", {i: _wanted(passage, i).shape[:-1].numel() for i in passage.samples})
    if not tokens:
        return None
    samples, own = list(tokens), set(passage.samples)
    split = split_samples(len(samples))
    train, judge = ([samples[i] for i in some] for some in (split.train, split.judge))
    tensors = parameters.tensors

    def error_now() -> float:
        return mean_of_all(ranks, "errors of a block", _errors_of(passage, parameters, [i for i in judge if i in own]))

    optimizer = torch.optim.Adam(tensors, lr=RATE, betas=BETAS)
    with frozen(passage.block):
        before = best = error_now()
        kept = copied(tensors)
        generator = torch.Generator().manual_seed(seed)
        total = epochs * -(-len(train) // BATCH)
        step = 0
        for _ in range(epochs):
            order = [train[i] for i in torch.randperm(len(train), generator=generator)]
            for start in range(0, len(order), BATCH):
                optimizer.param_groups[0]["lr"] = RATE * cosine(step, total)
                optimizer.zero_grad()
                batch = order[start : start + BATCH]
                _gradients(passage, parameters, [i for i in batch if i in own], sum(tokens[i] for i in batch))
                add_up_gradients(ranks, tensors)
                optimizer.step()
                step += 1
            error = error_now()
            if error < best:
                best, kept = error, copied(tensors)
        restore(tensors, kept)
    return Reconstruction(before, best, best < before)


def cosine(step: int, total: int) -> float:
    """Share of the learning rate at a step: from 1 to 0 along half a cosine."""
    return 0.5 * (1.0 + math.cos(math.pi * step / max(total, 1)))


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No parameter of the module itself takes a gradient; their flags come back afterwards."""
    flags = [(p, p.requires_grad) for p in module.parameters() if p.is_floating_point()]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@torch.enable_grad()
def _gradients(passage: BlockPassage, parameters: ModuleParameters, samples: Sequence[int], tokens: int) -> None:
    """Add the gradients of these samples' errors, over the ``tokens`` of a step.

    The weights are built once for all of them; each sample's activations go as soon as its gradient is in the weights.
    """
    if not samples:
        return
    built = parameters.build()
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in built.items()}
    for sample in samples:
        (_errors(passage, leaves, sample).sum() / tokens).backward()
    reached = [name for name in built if leaves[name].grad is not None]  # not the experts that no token chose
    torch.autograd.backward([built[n] for n in reached], [leaves[n].grad for n in reached])


@torch.no_grad()
def _errors_of(passage: BlockPassage, parameters: ModuleParameters, samples: Sequence[int]) -> list[Tensor]:
    built = parameters.build()
    return [_errors(passage, built, i) for i in samples]


def _errors(passage: BlockPassage, built: Mapping[str, Tensor], sample: int) -> Tensor:
    return hidden_error(hidden_states(passage.run(sample, built)), _wanted(passage, sample))


def _wanted(passage: BlockPassage, sample: int) -> Tensor:
    wanted = passage.dense(sample)
    if wanted is None:
        raise CalibrationError("a block can only be reconstructed with a dense stream beside the quantized one.")
    return wanted
