"""A block's end in the lockstep: running it again on the quantized stream's inputs, replacing its outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from optimum_sab.calibration.streams.caches import holds_cache
from optimum_sab.calibration.streams.placement import first_device, map_tensors


@dataclass(frozen=True)
class BlockPassage:
    """A decoder block that all samples have gone through.

    Attributes:
        block: the module, its linears still dense.
        samples: indices of the samples.
        run: ``(sample, parameters)`` → the block's output on the quantized stream's input, with these tensors in the
            place of the block's own parameters of that name. Keeps the caller's grad mode.
        dense: sample → hidden states [..., tokens, width] the dense stream left the block with; None without one.
        replace: ``(sample, output)`` lets the quantized stream go on with another output of `run`.
    """

    block: nn.Module
    samples: Sequence[int]
    run: Callable[[int, Mapping[str, Tensor]], Any]
    dense: Callable[[int], Tensor | None]
    replace: Callable[[int, Any], None]


class Finisher(Protocol):
    """What may be done beside binarizing: called for every block between the last `solve` and `leave`."""

    def known(self, index: int) -> bool:
        """Whether the block's result is there already. Then nothing is solved, and `finish` gives all outputs."""
        ...

    def finish(self, index: int, passage: BlockPassage) -> None: ...


def hidden_states(output: Any) -> Tensor:
    """The hidden states of a block's output, which is them or a tuple that begins with them."""
    return output[0] if isinstance(output, tuple) else output


def call_with(
    module: nn.Module,
    forward: Callable[..., Any],
    parameters: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Call ``forward``, a bound method of ``module``, while these tensors stand for the module's parameters."""
    swapped = {f"module.{name}": tensor for name, tensor in parameters.items()}
    return functional_call(_Call(module, forward), swapped, args, dict(kwargs))


def recomputed(call: Callable[..., Any], device: Any = None) -> Callable[..., Any]:
    """``call`` so that autograd keeps its arguments only and calls it again on the way back (checkpointing).

    Args:
        call: a block's forward, or what stands for it.
        device: where it computes: arguments are brought there, its output back to where they were. None leaves them.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        home = first_device((args, kwargs))
        if device is None or home is None:
            return call(*args, **kwargs)
        args, kwargs = map_tensors((args, kwargs), device)
        return map_tensors(call(*args, **kwargs), home)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if holds_cache((args, kwargs)):  # calling again would add to it
            return run(*args, **kwargs)
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return forward


class _Call(nn.Module):
    """A module whose forward is another's, which may have been wrapped since."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.module = module
        self._forward = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs)
