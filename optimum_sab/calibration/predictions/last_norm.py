"""The norm before the output embedding, which can take up a factor of all logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from optimum_sab.calibration.predictions.head import SharedHead
from optimum_sab.calibration.streams.patching import patched_forwards
from optimum_sab.errors import CalibrationError, StreamError
from optimum_sab.nn.decoder import find_decoder_blocks
from optimum_sab.nn.selection import shared_parameters


@dataclass(frozen=True)
class LastNorm:
    """The norm before the output embedding.

    Attributes:
        module: the norm.
        head: the output embedding.
        carrier: forward arguments that carry the model's forward to either.
        input: what the norm was given then, to try it on.
        blocks: the decoder blocks, and what each gave then. Replayed, they carry the forward to the embedding at the
            embedding's cost alone; empty where the model asks more of them.
    """

    module: nn.Module
    head: nn.Module
    carrier: Mapping[str, Any]
    input: Tensor
    blocks: Mapping[nn.Module, Any]

    def scale(self, factor: float) -> bool:
        """Multiply its output by a factor; False, and nothing changed, where its weight does not do that.

        Most norms multiply by their weight, some by one more than it (Gemma); what is right shows in the output.
        """
        vectors = [p for p in self.module.parameters(recurse=False) if p is not None]
        start = [p.detach().clone() for p in vectors]
        wanted = factor * self.module(self.input).float()
        errors = {}
        for offset in (0.0, 1.0):
            self._write(start, factor, offset)
            errors[offset] = float((self.module(self.input).float() - wanted).norm() / wanted.norm())
        best = min(errors, key=lambda offset: errors[offset])
        fits = errors[best] < 0.01  # bfloat16 rounds the weight by a quarter of that
        self._write(start, factor if fits else 1.0, best)
        return fits

    def _write(self, start: Sequence[Tensor], factor: float, offset: float) -> None:
        for name, value in zip([n for n, _ in self.module.named_parameters(recurse=False)], start, strict=True):
            shift = offset if name == "weight" else 0.0
            moved = (value.float() + shift) * factor - shift
            self.module.get_parameter(name).data.copy_(value if factor == 1.0 else moved)


@torch.no_grad()
def find_last_norm(model: nn.Module, head: nn.Module, carrier: Mapping[str, Any]) -> LastNorm | None:
    """The module with a one-dimensional weight of its own whose output is what the head is given; None without one.

    Args:
        model: in eval mode.
        head: its output embedding.
        carrier: forward arguments, of a single token where the model takes that.

    Raises:
        CalibrationError: the model does not take them.
    """
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []

    def watch(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            calls.append((module, args[0], output))

    shared = shared_parameters(model)
    norms = [
        m
        for m in model.modules()
        if isinstance(getattr(m, "weight", None), nn.Parameter)
        and all(p.ndim == 1 and p.is_floating_point() and id(p) not in shared for p in m.parameters())
    ]
    blocks: dict[nn.Module, Any] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        blocks[module] = output

    handles = [m.register_forward_hook(watch) for m in norms]
    handles += [block.register_forward_hook(keep) for block in find_decoder_blocks(model).blocks]
    try:
        with SharedHead(model, head).open() as opened:
            given, logits = opened.given_and_logits(carrier)
            if not _can_replay(opened, blocks, carrier, given, logits):
                blocks = {}
    except StreamError:
        raise
    except Exception as error:  # whatever a model of any kind may say to it; better now than after the work
        raise CalibrationError(f"the forward that should show it fails ({error})") from error
    finally:
        for handle in handles:
            handle.remove()
    found = [c for c in calls if c[2].shape == given.shape and torch.equal(c[2], given)]
    return LastNorm(found[-1][0], head, carrier, found[-1][1], blocks) if found else None


def replaying(blocks: Mapping[nn.Module, Any]) -> dict[nn.Module, Callable[..., Any]]:
    """Forwards that give what the blocks gave once."""

    def forward(output: Any, *args: Any, **kwargs: Any) -> Any:
        return output

    return {block: partial(forward, output) for block, output in blocks.items()}


def _can_replay(
    shared: SharedHead, blocks: Mapping[nn.Module, Any], carrier: Mapping[str, Any], given: Tensor, logits: Tensor
) -> bool:
    """Whether nothing behind the blocks asks for more than their output (what routers say, for one)."""
    try:
        with patched_forwards(replaying(blocks)):
            return torch.equal(shared.logits_of(given, carrier), logits)
    except StreamError:
        raise
    except Exception:  # whatever it misses: then the blocks run
        return False
