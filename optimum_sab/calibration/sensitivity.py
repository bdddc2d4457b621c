"""How much the model's predictions suffer from an error in each linear's output, from one backward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from optimum_sab.calibration.modality import token_modalities
from optimum_sab.errors import CalibrationError, NonFiniteError


def output_sensitivity(
    model: nn.Module, names: Sequence[str], samples: Sequence[Mapping[str, Any]], seed: int = 0
) -> dict[str, float]:
    """``s = 1/(2T) Σ_t ‖y_t‖²/n · E‖∂ log p(ŷ)/∂y_t‖²`` of every linear, ŷ drawn from the model's own predictions.

    To second order an error δ in a linear's output y costs ``KL = ½ δᵀ F δ``, with F the Fisher information of the
    predictions (at all later tokens too). For an error with the relative energy e that points anywhere that is
    ``e · s``: so ``s`` times the relative output error is the expected KL per token, in nats.

    Args:
        model: dense, with gradients possible; its parameters' ``requires_grad`` is put back.
        names: dotted names of the linears.
        samples: forward keyword arguments, one dict per sample.
        seed: of the drawn predictions.

    Raises:
        NonFiniteError: a gradient holds NaN or inf.
        CalibrationError: the model gives no logits, or its gradients do not reach a linear.
    """
    sums = dict.fromkeys(names, 0.0)
    tokens = 0
    wanted = [p.requires_grad for p in model.parameters()]
    with ExitStack() as stack:
        for name in names:
            stack.callback(model.get_submodule(name).register_forward_hook(_watch(sums, name)).remove)
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
        stack.callback(embeddings.register_forward_hook(_require_gradient).remove)
        stack.callback(lambda: [p.requires_grad_(w) for p, w in zip(model.parameters(), wanted, strict=True)])
        stack.enter_context(torch.enable_grad())
        model.requires_grad_(False)
        for index, sample in enumerate(samples):
            output = model(**sample, use_cache=False)
            logits = getattr(output, "logits", None)
            if logits is None:
                raise CalibrationError(
                    f"{type(model).__name__} gives no logits, which target_bits measures sensitivities by; set planes "
                    "per module with dynamic instead."
                )
            text = (token_modalities(sample, getattr(model, "config", None)).labels == 0).to(logits.device)
            log_p = logits[0].float()[text].log_softmax(-1)
            generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
            drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator).to(log_p.device)
            log_p.gather(1, drawn).sum().backward()
            tokens += int(text.sum())
    for name, total in sums.items():
        if not torch.isfinite(torch.tensor(total)):
            raise NonFiniteError(f"the gradient at {name} holds NaN or inf; load the model in bfloat16 or float32.")
    if not any(sums.values()):
        raise CalibrationError(
            f"no gradient reaches the linears of {type(model).__name__}; set planes per module with dynamic instead of "
            "target_bits."
        )
    return {name: total / (2 * max(1, tokens)) for name, total in sums.items()}


def _watch(sums: dict[str, float], name: str) -> Callable[[nn.Module, Any, Tensor], None]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        energy = output.detach().float().square().sum(-1)
        width = output.shape[-1]

        def add(gradient: Tensor) -> None:
            sums[name] += float((energy * gradient.float().square().sum(-1)).sum()) / width

        if output.requires_grad:
            output.register_hook(add)

    return hook


def _require_gradient(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """Frozen parameters record no graph; from the embeddings' output on there is one."""
    return output if output.requires_grad else output.detach().requires_grad_(True)
