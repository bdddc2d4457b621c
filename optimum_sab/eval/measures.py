"""How far a quantized model is from the dense one: perplexity, divergence of its predictions, error of its layers."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from optimum_sab.calibration.predictions.agreement import Agreement
from optimum_sab.calibration.samples.modality import TokenModalities, token_modalities
from optimum_sab.errors import ConfigError
from optimum_sab.nn.modalities import TEXT


@torch.inference_mode()
def perplexity(model: Any, windows: Tensor) -> float:
    """``exp`` of the mean next-token loss over windows [count, length]."""
    total = 0.0
    for window in windows:
        logits = model(input_ids=window[None]).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, window[1:]))
    return math.exp(total / len(windows))


@torch.inference_mode()
def agreement(dense: Any, quantized: Any, probes: Sequence[Mapping[str, Any]]) -> Agreement:
    """Compare two models' predictions on the text tokens of the same inputs.

    Args:
        dense: the reference.
        quantized: the other model.
        probes: keyword arguments of the models' forward, one sample each.

    Raises:
        ConfigError: no probe has a text token.
    """
    masks = [token_modalities(probe, dense.config).text for probe in probes]
    judged = [(probe, text) for probe, text in zip(probes, masks, strict=True) if bool(text.any())]
    if not judged:
        raise ConfigError("the probes have no text token to compare predictions at; give prompts with text.")
    return Agreement.of((quantized(**probe).logits[0][text], dense(**probe).logits[0][text]) for probe, text in judged)


@torch.inference_mode()
def layer_errors(
    dense: nn.Module, quantized: nn.Module, names: Sequence[str], probes: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """Relative output error ``Σ‖(W − Q) x‖² / Σ‖W x‖²`` per modality, x the dense model's own inputs.

    A mean over linears, so that a layer with large outputs does not decide alone. This is
    ``tr((W−Q)H(W−Q)ᵀ) / tr(WHWᵀ)`` under held-out Hessians that are never built.

    Args:
        dense: the model whose linears are compared.
        quantized: a model with dense weights under the same names.
        names: dotted names of the linears.
        probes: keyword arguments of the dense model's forward, one sample each.
    """
    sums: dict[str, dict[str, Tensor]] = defaultdict(lambda: defaultdict(lambda: torch.zeros(2, dtype=torch.float64)))
    current: TokenModalities

    def compare(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        weights: list[Tensor] = [m.get_submodule(name).weight for m in (dense, quantized)]  # type: ignore[misc]

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].flatten(0, -2)
            wanted, given = (nn.functional.linear(x, weight).float() for weight in weights)
            wrong, right = (wanted - given).square().sum(1), wanted.square().sum(1)
            for index, modality in enumerate(current.names):
                mask = (current.labels == index).to(x.device)
                if mask.numel() == x.shape[0] and bool(mask.any()):
                    sums[modality][name] += torch.stack([wrong[mask].sum(), right[mask].sum()]).double().cpu()

        return hook

    handles = [dense.get_submodule(n).register_forward_pre_hook(compare(n)) for n in names]
    try:
        for probe in probes:
            current = token_modalities(probe, getattr(dense, "config", None))
            dense(**probe)
    finally:
        for handle in handles:
            handle.remove()
    order = [TEXT, *(m for m in sums if m != TEXT)]
    return {
        modality: sum(float(s[0] / s[1].clamp_min(1e-300)) for s in sums[modality].values()) / len(sums[modality])
        for modality in order
        if sums[modality]
    }
