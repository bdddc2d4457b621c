"""Held-out output error of single linears under several methods, same Hessians, on a real language model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_sab.bench.text import SOURCES, mixed_windows, text_windows
from optimum_sab.core.hessian import InputMoments, InputStatistics
from optimum_sab.core.settings import LayerSettings
from optimum_sab.core.solver import output_error, solve
from optimum_sab.errors import ConfigError
from optimum_sab.eval.baselines.gptq import gptq
from optimum_sab.format.packed_weight import PackedWeight
from optimum_sab.nn.decoder import find_decoder_blocks

LAYERS = (8, 28)
LINEARS = ("q_proj", "o_proj", "gate_proj", "down_proj")


@dataclass(frozen=True)
class MethodError:
    """One method over the chosen linears.

    Attributes:
        method: its name.
        error: mean of ``tr((W−Q)H(W−Q)ᵀ) / tr(WHWᵀ)`` under the held-out Hessians.
        by_source: the same per held-out text.
        bits_per_weight: mean over the linears, from stored bytes.
    """

    method: str
    error: float
    by_source: dict[str, float]
    bits_per_weight: float


Method = Callable[[Tensor, InputStatistics], tuple[Tensor, float]]


def methods() -> dict[str, Method]:
    """The methods compared, by name."""
    plain = LayerSettings()

    def packed(settings: LayerSettings) -> Method:
        def run(weight: Tensor, statistics: InputStatistics) -> tuple[Tensor, float]:
            result = PackedWeight.pack(solve(weight, statistics, settings).planes, settings)
            return result.dequantize(), result.bits_per_weight

        return run

    def gptq_bits(bits: int) -> Method:
        def run(weight: Tensor, statistics: InputStatistics) -> tuple[Tensor, float]:
            result = gptq(weight, statistics.hessian, bits)
            return result.weight, result.bits_per_weight

        return run

    return {
        "default": packed(plain),
        "default, no sign descent": packed(plain.replace(sweeps=0)),
        "same planes, block compensation, no refit": packed(plain.replace(feedback="block", refit=False, sweeps=0)),
        "GPTQ 2-bit g128": gptq_bits(2),
        "GPTQ 3-bit g128": gptq_bits(3),
    }


@torch.no_grad()
def compare_layers(
    model_path: str,
    layers: Sequence[int] = LAYERS,
    linears: Sequence[str] = LINEARS,
    samples: int = 32,
    length: int = 512,
    text: str = "reference",
) -> list[MethodError]:
    """Fit every method on the Hessians of some text and score it under Hessians of text it never saw.

    The held-out Hessians are of the other halves of the reference text and of the built-in passages, ``samples / 2``
    windows each (`bench.text`).

    Args:
        model_path: checkpoint of a causal language model.
        layers: decoder layers.
        linears: last name parts of the linears.
        samples: calibration windows.
        length: tokens per window.
        text: calibration text: "reference", "passages", or "mixed".
    """
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    targets = _targets(model, layers, linears)
    calibration = _statistics(model, targets, mixed_windows(tokenizer, text, "calibration", samples, length))
    held_out = {
        source: _statistics(model, targets, text_windows(tokenizer, source, "held-out", max(1, samples // 2), length))
        for source in SOURCES
    }
    results = []
    for name, method in methods().items():
        errors: dict[str, list[float]] = {source: [] for source in held_out}
        bits = []
        for key, linear in targets.items():
            weight = linear.weight.float()
            approximation, stored = method(weight, calibration[key])
            bits.append(stored)
            for source, statistics in held_out.items():
                errors[source].append(output_error(weight, approximation, statistics[key].hessian))
        by_source = {source: sum(e) / len(e) for source, e in errors.items()}
        mean = sum(by_source.values()) / len(by_source)
        results.append(MethodError(name, mean, by_source, sum(bits) / len(bits)))
    return results


def _targets(model: nn.Module, layers: Sequence[int], linears: Sequence[str]) -> dict[str, nn.Linear]:
    prefix = find_decoder_blocks(model).prefix
    chosen = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and any(name.startswith(f"{prefix}.{i}.") for i in layers)
        and name.rpartition(".")[2] in linears
    }
    if not chosen:
        raise ConfigError(f"no linear named {', '.join(linears)} in layers {list(layers)} of {type(model).__name__}.")
    return chosen


def _statistics(model: nn.Module, targets: dict[str, nn.Linear], windows: Tensor) -> dict[str, InputStatistics]:
    moments = {
        name: InputMoments(linear.in_features, linear.weight.device, False, name) for name, linear in targets.items()
    }

    def collect(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            moments[name].add("text", args[0].flatten(0, -2))

        return hook

    handles = [linear.register_forward_pre_hook(collect(name)) for name, linear in targets.items()]
    try:
        for window in windows:
            model(input_ids=window[None], use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return {name: m.statistics() for name, m in moments.items()}
