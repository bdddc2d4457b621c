"""How much the model's predictions suffer from an error in each linear's output, from one backward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optimum_sab.calibration.allocation.blockwise import BlockwiseBackward
from optimum_sab.calibration.allocation.recomputation import Recomputation
from optimum_sab.calibration.predictions.head import output_embedding
from optimum_sab.calibration.progress import OnStep, no_step
from optimum_sab.calibration.samples.modality import TokenModalities, token_modalities
from optimum_sab.calibration.streams.modes import without_cache
from optimum_sab.calibration.streams.patching import patched_forwards
from optimum_sab.errors import CalibrationError, NonFiniteError
from optimum_sab.nn.decoder import input_embedding
from optimum_sab.nn.streamed import is_streamed


def output_sensitivity(
    model: nn.Module,
    names: Sequence[str],
    samples: Sequence[Mapping[str, Any]],
    recomputation: Recomputation | None = None,
    seed: int = 0,
    on_step: OnStep = no_step,
) -> dict[str, float]:
    """``s = 1/(2T) Σ_t ‖y_t‖²/n · E‖∂ log p(ŷ)/∂y_t‖²`` of every linear, ŷ drawn from the model's own predictions.

    To second order an error δ in a linear's output y costs ``KL = ½ δᵀ F δ``, with F the Fisher information of the
    predictions (at all later tokens too). For an error with the relative energy e that points anywhere that is
    ``e · s``: so ``s`` times the relative output error is the expected KL per token, in nats. Of a model without
    logits, or with a single one, the relative squared error of its last hidden states h (or of that number) takes the
    divergence's place: ``log p(ŷ)`` is then ``zᵀh / ‖h‖`` with z drawn from a normal distribution.

    Args:
        model: dense, with gradients possible; its parameters' ``requires_grad`` is put back.
        names: dotted names of the linears.
        samples: forward keyword arguments, one dict per sample.
        recomputation: blocks that are run again on the way back; None keeps all activations. Where their weights are
            streamed, all samples go through them together.
        seed: of the drawn predictions, from 0 to 2⁶⁴ - 1.
        on_step: told after every sample.

    Raises:
        NonFiniteError: the model's output or a gradient holds NaN or inf.
        CalibrationError: the model's gradients do not reach a linear, or inference mode forbids them.
    """
    seeds = [sample_seed(seed, index) for index in range(len(samples))]
    return sensitivity_of(model, [gradient_energy(model, names, samples, recomputation, seeds, on_step)])


@dataclass(frozen=True)
class GradientEnergy:
    """Sums over some samples, which can be added up.

    Attributes:
        of: ``Σ_t ‖y_t‖²/n · ‖∂ log p(ŷ)/∂y_t‖²`` of every linear.
        tokens: predictions that were judged.
    """

    of: Mapping[str, float]
    tokens: int


def sensitivity_of(model: nn.Module, parts: Sequence[GradientEnergy]) -> dict[str, float]:
    """`output_sensitivity` from all samples' sums.

    Raises:
        NonFiniteError, CalibrationError: as there.
    """
    sums = {name: sum(part.of[name] for part in parts) for name in parts[0].of}
    for name, total in sums.items():
        if not math.isfinite(total):
            raise NonFiniteError(f"the gradient at {name} holds NaN or inf; load the model in bfloat16 or float32.")
    if not any(sums.values()):
        raise CalibrationError(
            f"no gradient reaches the linears of {type(model).__name__}, so it cannot be measured which of them need "
            "more bits; use allocation='uniform'."
        )
    tokens = max(1, sum(part.tokens for part in parts))
    return {name: total / (2 * tokens) for name, total in sums.items()}


def gradient_energy(
    model: nn.Module,
    names: Sequence[str],
    samples: Sequence[Mapping[str, Any]],
    recomputation: Recomputation | None,
    seeds: Sequence[int],
    on_step: OnStep = no_step,
) -> GradientEnergy:
    """What `output_sensitivity` sums up, over some of the samples; arguments and errors as there.

    Args:
        model, names, samples, recomputation, on_step: see there.
        seeds: of each sample's draws (`sample_seed` of its place among all).
    """
    refuse_inference_mode(model)
    sums = dict.fromkeys(names, 0.0)
    wanted = [p.requires_grad for p in model.parameters()]
    with ExitStack() as stack:
        for name in names:
            stack.callback(model.get_submodule(name).register_forward_hook(_watch(sums, name)).remove)
        embeddings = input_embedding(model)
        if embeddings is not None:
            stack.callback(embeddings.register_forward_hook(_require_gradient).remove)
        head = output_embedding(model)
        if head is not None:
            stack.callback(head.register_forward_pre_hook(_keep_judged).remove)
        for block in () if recomputation is None else recomputation.blocks:
            stack.callback(block.register_forward_pre_hook(_begin_gradient, with_kwargs=True).remove)
        stack.callback(lambda: [p.requires_grad_(w) for p, w in zip(model.parameters(), wanted, strict=True)])
        stack.enter_context(torch.enable_grad())
        model.requires_grad_(False)
        counts: dict[int, int] = {}

        def backward(index: int) -> None:
            generator = torch.Generator().manual_seed(seeds[index])
            judged = _Judged(token_modalities(samples[index], getattr(model, "config", None)))
            before = _JUDGED.set(judged)  # of this coroutine, where samples go together
            try:
                output = model(**samples[index], **without_cache(model))
            finally:
                _JUDGED.reset(before)
            drawn, counts[index] = _drawn_log_probability(output, judged, generator)
            drawn.backward(retain_graph=bool(streamed))  # of which blocks have given parts to each other

        streamed = [each for each in (recomputation.blocks if recomputation else ()) if is_streamed(each)]
        if recomputation and streamed:
            blockwise = BlockwiseBackward(streamed, recomputation.device, recomputation.mapped)
            blockwise.run(backward, len(samples), on_step)
        else:
            stack.enter_context(patched_forwards({} if recomputation is None else recomputation.forwards()))
            for index in range(len(samples)):
                backward(index)
                on_step(index + 1, len(samples))
    return GradientEnergy(sums, sum(counts.values()))


def sample_seed(seed: int, index: int) -> int:
    """Of one sample's draws: within what torch takes as a seed, whatever the run's is."""
    return (seed * 1_000_003 + index) % 2**64


def refuse_inference_mode(model: nn.Module) -> None:
    """Gradients are needed.

    Raises:
        CalibrationError: there can be none.
    """
    if torch.is_inference_mode_enabled() or any(p.is_inference() for p in model.parameters()):
        raise CalibrationError(
            "inside torch.inference_mode() no gradient can be had to allocate bits by; load the model outside of it "
            "(torch.no_grad() is fine), or use allocation='uniform'."
        )


@dataclass
class _Judged:
    """Which predictions of a sample are judged.

    Attributes:
        modalities: of its tokens.
        kept: how many tokens the output embedding was given, where it was given the judged ones alone.
    """

    modalities: TokenModalities
    kept: int | None = None

    def of(self, rows: Tensor) -> Tensor:
        """Those of a model's output [predictions, ...] that are judged."""
        if len(rows) == self.kept:
            return rows
        return rows[self.modalities.judged(len(rows)).to(rows.device)]


_JUDGED: ContextVar[_Judged] = ContextVar("judged")


def _keep_judged(head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Give the output embedding the judged tokens alone: logits of a large picture are larger than all else."""
    hidden = args[0] if args else None
    if not isinstance(hidden, Tensor) or hidden.ndim != 3 or hidden.shape[0] != 1:
        return None
    judged = _JUDGED.get()
    which = judged.modalities.judged(hidden.shape[1])
    judged.kept = int(which.sum())
    return (hidden[:, which.to(hidden.device)], *args[1:])


def _drawn_log_probability(output: Any, judged: _Judged, generator: torch.Generator) -> tuple[Tensor, int]:
    """What is differentiated, summed over the predictions that are judged, and how many those are.

    Predictions are logits [..., classes]: for each token, or one for the sample.
    """
    logits = getattr(output, "logits", None)
    given = output[0] if logits is None else logits
    if not bool(torch.isfinite(given).all()):
        raise NonFiniteError("the model's output holds NaN or inf; load the model in bfloat16 or float32.")
    rows = judged.of(given.flatten(0, -2)).float()
    if logits is not None and rows.shape[-1] > 1:
        log_p = rows.log_softmax(-1)
        drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator).to(log_p.device)
        return log_p.gather(1, drawn).sum(), len(rows)
    direction = torch.randn(rows.shape, generator=generator).to(rows.device)
    return (rows * direction / rows.detach().norm(dim=-1, keepdim=True).clamp_min(1e-12)).sum(), len(rows)


def _watch(sums: dict[str, float], name: str) -> Callable[[nn.Module, Any, Tensor], None]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        energy = output.detach().float().square().sum(-1)
        width = output.shape[-1]

        def add(gradient: Tensor) -> None:
            sums[name] += float((energy * gradient.float().square().sum(-1)).sum()) / width

        if output.requires_grad:
            output.register_hook(add)

    return hook


def _begin_gradient(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """From a block's hidden states on, where no embedding of tokens was come by before."""
    if args and isinstance(args[0], Tensor) and args[0].is_floating_point() and not args[0].requires_grad:
        return (args[0].detach().requires_grad_(True).clone(), *args[1:]), kwargs
    hidden = kwargs.get("hidden_states")
    if isinstance(hidden, Tensor) and not hidden.requires_grad:
        return args, {**kwargs, "hidden_states": hidden.detach().requires_grad_(True).clone()}
    return None


def _require_gradient(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """Frozen parameters record no graph; from the embeddings' output on there is one.

    It is a copy, because models write pictures into it in place, which autograd refuses on a leaf.
    """
    return output if output.requires_grad else output.detach().requires_grad_(True).clone()
