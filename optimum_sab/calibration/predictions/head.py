"""The output embedding, and logits of two models that have it in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from optimum_sab.calibration.streams.modes import without_cache
from optimum_sab.calibration.streams.passage import call_with
from optimum_sab.calibration.streams.patching import patched_forwards
from optimum_sab.calibration.streams.placement import brought


def output_embedding(model: nn.Module) -> nn.Module | None:
    """The model's language head; None without one."""
    accessor = getattr(model, "get_output_embeddings", None)
    head = accessor() if callable(accessor) else None
    return head if isinstance(head, nn.Module) else None


class SharedHead:
    """A causal model whose output embedding also makes the logits of another model's hidden states.

    Both go through the model's own way from the head on, which may scale or cap them. So of the other model, whose
    blocks are gone, only what it gave to the head is to be kept.

    Args:
        model: the model.
        head: its output embedding.
        device: where the head computes, its weight brought there; None leaves it where it is.
    """

    def __init__(self, model: nn.Module, head: nn.Module, device: torch.device | None = None) -> None:
        self._model = model
        self._head = head
        self._device = device
        self._at_head: Callable[[Callable[..., Any], Tensor], Tensor] | None = None

    @contextmanager
    def open(self) -> Iterator[SharedHead]:
        """Inside, the other methods work; outside, the head is as it was."""
        with patched_forwards({self._head: self._wrap(self._on_device(self._head.forward))}):
            yield self

    def given(self, inputs: Mapping[str, Any]) -> Tensor:
        """What the model gives to its head, [batch, tokens, width]. Logits are made of the last token alone."""
        return self._given(inputs, slice(-1, None))[0]

    def given_and_logits(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """What the model gives to its head, [batch, tokens, width], and its logits, of one forward."""
        hidden, output = self._given(inputs, slice(None))
        logits: Tensor = output.logits
        return hidden, logits

    def _given(self, inputs: Mapping[str, Any], of: slice) -> tuple[Tensor, Any]:
        """What is given to the head, and the model's output for some of the tokens."""
        caught: list[Tensor] = []

        def keep(head: Callable[..., Any], hidden: Tensor) -> Tensor:
            caught.append(hidden.detach())
            return head(hidden[..., of, :])

        output = self._run(inputs, keep)
        return caught.pop(), output

    def logits(self, inputs: Mapping[str, Any], other: Tensor, of: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits [batch, tokens, vocabulary] of the model, and of the other one without gradient.

        Args:
            inputs: forward arguments of a batch.
            other: what the other model gives to the head, [batch, tokens, width].
            of: the tokens of the inputs that these are: bool [tokens], the same of all of the batch, or
                [batch, tokens], and then what is given and returned is a batch of one. None for all.
        """

        def beside(head: Callable[..., Any], hidden: Tensor) -> Tensor:
            own = head(hidden if of is None else _some(hidden, of.to(hidden.device)))
            with torch.no_grad():
                others = head(other.to(hidden.device, hidden.dtype))
            return torch.cat([own, others])

        both = self._run(inputs, beside).logits
        batch = other.shape[0]
        return both[:batch], both[batch:].detach()

    def logits_of(self, hidden: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """Logits [batch, tokens, vocabulary] of what might be given to the head.

        Args:
            hidden: [batch, tokens, width].
            inputs: any forward arguments, the fewer tokens the better: they only carry the model's forward to the head.
        """
        logits: Tensor = self._run(inputs, lambda head, given: head(hidden.to(given.device, given.dtype))).logits
        return logits

    def _run(self, inputs: Mapping[str, Any], at_head: Callable[[Callable[..., Any], Tensor], Tensor]) -> Any:
        """The model's output, with ``at_head(head, given)`` in the place of ``head(given)``."""
        self._at_head = at_head
        try:
            return self._model(**inputs, **without_cache(self._model))
        finally:
            self._at_head = None

    def _on_device(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """The head's forward where it is to compute. Its weight is brought there once, since it is used often."""
        tensors = brought(self._head, self._device)
        if not tensors:
            return original

        def call(hidden: Tensor) -> Any:
            return call_with(self._head, original, tensors, (hidden.to(self._device),), {})

        return call

    def _wrap(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(input: Tensor) -> Any:
            return original(input) if self._at_head is None else self._at_head(original, input)

        return forward


def _some(hidden: Tensor, of: Tensor) -> Tensor:
    """Some tokens of [batch, tokens, width], as `SharedHead.logits` has them."""
    return hidden[..., of, :] if of.ndim == 1 else hidden[of][None]
