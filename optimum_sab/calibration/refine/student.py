"""A binarized model in trainable form, with the teacher's logits beside its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optimum_sab.calibration.predictions.head import SharedHead
from optimum_sab.calibration.refine.parameters import ModuleParameters
from optimum_sab.calibration.streams.passage import call_with, recomputed
from optimum_sab.calibration.streams.patching import patched_forwards
from optimum_sab.calibration.streams.placement import brought
from optimum_sab.nn.linear import SABLinear
from optimum_sab.nn.modules import set_module


@dataclass(frozen=True)
class TunedModule:
    """A decoder block, or a norm behind the blocks, and what is trained in it."""

    module: nn.Module
    parameters: ModuleParameters


class Student:
    """A causal model whose tuned modules compute with the parameters built from their trainable tensors.

    Weights are built inside every block's forward, and what is not trained is brought to the device there, and the
    block is run again for its gradients (checkpointing), so that one block's dense weights are held at a time.

    Args:
        model: binarized.
        tuned: modules in the order the model calls them.
        head: the model's output embedding.
        device: where the tuned modules and the head compute; None leaves each where it is.
    """

    def __init__(
        self, model: nn.Module, tuned: Sequence[TunedModule], head: nn.Module, device: torch.device | None
    ) -> None:
        self.model = model
        self.tuned = tuned
        self._head = SharedHead(model, head, device)
        self._device = device

    def logits(self, inputs: Mapping[str, Any], teacher: Tensor, of: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the student, and of the teacher from what it gives to the head: `SharedHead.logits`."""
        return self._head.logits(inputs, teacher, of)

    @contextmanager
    def prepared(self) -> Iterator[Student]:
        """Inside, `logits` works; outside, the model is as it was: layers, forwards, gradient flags."""
        layers = [(t.module, name, t.module.get_submodule(name)) for t in self.tuned for name in t.parameters.scales]
        flags = [(p, p.requires_grad) for p in self.model.parameters() if p.is_floating_point()]
        try:
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            for owner, name, layer in layers:
                assert isinstance(layer, SABLinear)
                set_module(owner, name, _stand_in(layer))
            forwards = {t.module: self._wrap_module(t, t.module.forward) for t in self.tuned}
            with patched_forwards(forwards), self._head.open():
                yield self
        finally:
            for owner, name, layer in layers:
                set_module(owner, name, layer)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

    def _wrap_module(self, tuned: TunedModule, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = {**brought(tuned.module, self._device), **tuned.parameters.build()}
            return call_with(tuned.module, original, tensors, args, kwargs)

        return recomputed(call, self._device)


def _stand_in(layer: SABLinear) -> nn.Linear:
    """A linear without a weight, which the built parameters bring."""
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear._parameters["weight"] = None
    linear.bias = layer.bias  # type: ignore[assignment]
    return linear.train(layer.training)
