"""Experts of random content, packed and dense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from optimum_sab.bench.conditions import Conditions
from optimum_sab.bench.shapes import ExpertsShape
from optimum_sab.core.settings import LayerSettings
from optimum_sab.format.random_weight import SCALE, random_packed
from optimum_sab.ops.experts import ExpertWeights, experts_linear
from optimum_sab.ops.shape import LayerShape


class PackedExperts:
    """Random packed experts; called as a module of Transformers' is: inputs, experts, their weights.

    Attributes:
        bytes: of the stored tensors.
    """

    def __init__(self, shape: ExpertsShape, settings: LayerSettings, seed: int, device: torch.device) -> None:
        self.backend: str | None = None
        self.bytes = 0
        self._gate_up = self._stack(2 * shape.intermediate, shape.hidden, shape.experts, settings, (seed, device))
        self._down = self._stack(shape.hidden, shape.intermediate, shape.experts, settings, (seed + 1, device))

    def _stack(
        self, rows: int, columns: int, experts: int, settings: LayerSettings, where: tuple[int, torch.device]
    ) -> Callable[[Tensor, Tensor, int], Tensor]:
        (seed, device), shape = where, LayerShape.of(rows, columns, settings)
        layers = [random_packed(rows, columns, settings, seed + 2 * e, device).tensors for e in range(experts)]
        tensors = [torch.stack([layer[name] for layer in layers]) for name in shape.names]
        self.bytes += sum(tensor.nbytes for tensor in tensors)
        layout = "stored"
        if device.type != "cpu":  # as a module on an accelerator holds them
            from sab_kernels import to_kernel_layout

            turned = [to_kernel_layout(layer, shape.geometry) for layer in layers]
            tensors, layout = [torch.stack([layer[name] for layer in turned]) for name in shape.names], "kernel"

        def multiply(x: Tensor, chosen: Tensor, repeats: int) -> Tensor:
            return experts_linear(x, chosen, ExpertWeights(tensors, shape, None, layout, self.backend), repeats)

        return multiply

    def __call__(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        chosen, top_k = index.reshape(-1), index.shape[-1]
        gate, up = self._gate_up(x, chosen, top_k).chunk(2, -1)
        out = self._down(silu(gate) * up, chosen, 1)
        return (out * weights.reshape(-1, 1).to(out.dtype)).view(len(x), top_k, -1).sum(1)

    def reference(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The same by the slow reference, rounded at the same places."""
        before, self.backend = self.backend, "reference"
        try:
            return self(x, index, weights)
        finally:
            self.backend = before


def dense_experts(shape: ExpertsShape, conditions: Conditions) -> nn.Module:
    """Qwen3-MoE's experts as Transformers has them, of random weights: one expert's, copied to the places of all."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.intermediate,
    )
    with torch.device("meta"):
        module = Qwen3MoeExperts(config).to(conditions.dtype)
    module = module.to_empty(device=conditions.device).requires_grad_(False)
    generator = torch.Generator(conditions.device).manual_seed(conditions.seed)
    for parameter in module.parameters():
        one = torch.randn(parameter.shape[1:], device=conditions.device, generator=generator).mul_(SCALE)
        parameter.copy_(one)
    return module


def with_implementation(module: nn.Module, name: str, *arguments: Tensor) -> Tensor:
    """What experts of Transformers compute by one of its implementations."""
    config: Any = module.config
    config._experts_implementation = name
    output: Tensor = module(*arguments)
    return output
