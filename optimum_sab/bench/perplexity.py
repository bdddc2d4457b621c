"""Perplexity of a language model before and after binarization, on held-out text."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_sab.bench.text import SOURCES, mixed_windows, text_windows
from optimum_sab.hf.config import SABConfig


@dataclass(frozen=True)
class PerplexityChange:
    """Perplexity per held-out text, dense and packed; bits from stored bytes; seconds of the quantization alone."""

    dense: dict[str, float]
    packed: dict[str, float]
    bits_per_weight: float
    seconds: float

    @property
    def ratio(self) -> dict[str, float]:
        """Packed over dense, per text."""
        return {source: self.packed[source] / self.dense[source] for source in self.dense}


def compare_perplexity(
    model_path: str,
    config: SABConfig,
    calibration: str = "reference",
    samples: int = 64,
    length: int = 512,
    held_out: int = 24,
) -> PerplexityChange:
    """Binarize a causal language model inside ``from_pretrained`` and measure both models.

    Args:
        model_path: checkpoint of a causal language model.
        config: how; its ``calibration`` is replaced.
        calibration: "reference", "passages", or "mixed" (half of each), `bench.text`'s calibration halves.
        samples: calibration windows.
        length: tokens per window.
        held_out: windows of each held-out text.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    windows = {source: text_windows(tokenizer, source, "held-out", held_out, length) for source in SOURCES}
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    dense = {source: perplexity(model, w) for source, w in windows.items()}
    del model
    chosen = mixed_windows(tokenizer, calibration, "calibration", samples, length)
    config.calibration = [tokenizer.decode(window) for window in chosen]
    config.calibration_samples, config.sequence_length = samples, length
    started = time.perf_counter()
    packed: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32, quantization_config=config)
    seconds = time.perf_counter() - started
    bits = packed.hf_quantizer.report.bits_per_weight
    packed.dequantize()  # the same weights; the reference forward would dequantize at every call
    return PerplexityChange(dense, {source: perplexity(packed, w) for source, w in windows.items()}, bits, seconds)


@torch.inference_mode()
def perplexity(model: Any, windows: Tensor) -> float:
    """``exp`` of the mean next-token loss over windows [count, length]."""
    total = 0.0
    for window in windows:
        logits = model(input_ids=window[None]).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, window[1:]))
    return math.exp(total / len(windows))
