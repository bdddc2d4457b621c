"""Every sample runs the model's own forward once; all wait for each other at every linear that is binarized.

A sample is a coroutine (greenlet) per stream. Target linears and decoder blocks have their ``forward`` wrapped: the
coroutine pauses there and hands its input to the scheduler. When all that will ever come have come, the visitor
binarizes the linears that share this input, and the coroutines go on, the quantized stream through the new weight.
So no code here knows an architecture, each stream is one forward in all, and each linear's calibration input already
carries the error of every linear before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from optimum_sab.errors import LockstepError, MissingDependencyError

DENSE, QUANTIZED = "dense", "quantized"


@dataclass(frozen=True)
class Arrival:
    """One coroutine waiting at a linear: the sample's index, its stream, and the linear's input [..., tokens, in]."""

    sample: int
    stream: str
    inputs: Tensor


class Visitor(Protocol):
    """What the scheduler calls, in this order for every block: `enter`, `solve` per group of linears, `leave`."""

    def enter(self, index: int) -> None: ...

    def solve(self, names: tuple[str, ...], arrivals: Sequence[Arrival]) -> Mapping[str, Tensor]:
        """Binarize the linears that share an input; returns the weight each quantized stream goes on with."""
        ...

    def leave(self, index: int, drift: float | None) -> None: ...


@dataclass
class _Pause:
    """Why a coroutine handed over: at a block's entry, at a linear, or past the last block."""

    kind: str
    key: int | str
    payload: Any = None
    state: _TorchState | None = None  # the coroutine's own, to run its block in its place

    def __str__(self) -> str:
        return f"{self.kind} {self.key}".strip()


@dataclass
class _TorchState:
    """Grad mode and autocast are thread-local and greenlets share a thread: carried along at every switch."""

    grad: bool
    autocast: dict[str, tuple[bool, torch.dtype]]

    @classmethod
    def capture(cls) -> _TorchState:
        kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        return cls(
            torch.is_grad_enabled(),
            {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds},
        )

    def restore(self) -> None:
        torch.set_grad_enabled(self.grad)
        for kind, (enabled, dtype) in self.autocast.items():
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)


@dataclass
class _Group:
    """Linears that share one input, in calling order."""

    names: tuple[str, ...]
    solved: bool = False
    seen: set[tuple[int, str]] = field(default_factory=set)  # coroutines that waited here


@dataclass
class Lockstep:
    """The scheduler.

    Args:
        model: in eval mode, weights on real devices.
        blocks: the decoder blocks, in the order the model calls them.
        linears: target linears by dotted name, per block.
        samples: keyword arguments of the model's forward, one dict per sample.
        two_streams: run a dense stream beside the quantized one.
        device: where each block is moved while its samples run; None leaves everything where it is.
    """

    model: nn.Module
    blocks: Sequence[nn.Module]
    linears: Sequence[Mapping[str, nn.Linear]]
    samples: Sequence[Mapping[str, Any]]
    two_streams: bool
    device: torch.device | None = None
    _weights: dict[str, Tensor] = field(default_factory=dict, init=False)
    _groups: dict[str, _Group] = field(default_factory=dict, init=False)
    _recording: list[tuple[str, Tensor]] | None = field(default=None, init=False)

    def run(self, visitor: Visitor) -> None:
        """Drive all samples through all blocks.

        Raises:
            LockstepError: samples disagree about the next block, or one reaches a linear that is already binarized.
        """
        greenlet = _import_greenlet()
        self._main = greenlet.getcurrent()
        self._current = greenlet.getcurrent
        streams = (DENSE, QUANTIZED) if self.two_streams else (QUANTIZED,)
        with torch.no_grad(), self._patched():
            self._state = _TorchState.capture()
            self._workers = [(i, stream) for i in range(len(self.samples)) for stream in streams]
            self._greenlets = [greenlet.greenlet(self._forward) for _ in self._workers]
            self._identity = dict(zip(self._greenlets, self._workers, strict=True))
            self._greenlet_of = dict(zip(self._workers, self._greenlets, strict=True))
            try:
                waiting = {w: g.switch(w[0]) for w, g in zip(self._workers, self._greenlets, strict=True)}
                for index in range(len(self.blocks)):
                    waiting = self._visit_block(index, waiting, visitor)
                self._finish()
            finally:
                for g in self._greenlets:
                    if not g.dead:
                        g.throw(greenlet.GreenletExit)
                self._state.restore()

    # -- one block -----------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Let one sample run to its end: what comes back to a block was calibrated on half of its way."""
        last = self._greenlets[0].switch()
        if last.kind != "end of the forward":
            raise LockstepError(
                f"a sample comes to {last} again after the last decoder block; models that use a block twice in one "
                "forward cannot be binarized."
            )

    def _visit_block(
        self, index: int, waiting: dict[tuple[int, str], _Pause], visitor: Visitor
    ) -> dict[tuple[int, str], _Pause]:
        for worker, pause in waiting.items():
            if pause.kind != "block" or pause.key != index:
                raise LockstepError(
                    f"sample {worker[0]} is at {pause} while the others enter decoder block {index}: "
                    "every sample must go through every block once, in order. Remove the sample, or report the model."
                )
        visitor.enter(index)
        self._weights.clear()
        block, home = self.blocks[index], _device_of(self.blocks[index])
        if self.device is None or home is None or home == self.device:
            waiting = self._work_on_block(index, waiting, visitor)
        else:
            block.to(self.device)
            try:
                waiting = self._work_on_block(index, waiting, visitor)
            finally:
                block.to(home)
        return self._resume(waiting) if index + 1 < len(self.blocks) else waiting

    def _work_on_block(
        self, index: int, waiting: dict[tuple[int, str], _Pause], visitor: Visitor
    ) -> dict[tuple[int, str], _Pause]:
        self._groups = self._probe(index, waiting[self._workers[0]])
        waiting = self._resume(waiting)
        while at_linear := {w: p for w, p in waiting.items() if p.kind == "linear"}:
            group, here = self._next_group(index, at_linear)
            arrivals = [Arrival(w[0], w[1], p.payload) for w, p in here.items()]
            self._weights.update(visitor.solve(group.names, arrivals))
            group.solved = True
            group.seen.update(here)
            del arrivals
            for pause in here.values():
                pause.payload = None  # frees the inputs of this group
            waiting.update(self._resume(here))
        missed = [n for n in self.linears[index] if n not in self._groups or not self._groups[n].solved]
        if missed:
            raise LockstepError(
                f"no calibration token reached {missed[0]} ({len(missed)} linears of its block): give more or more "
                f"varied samples, or leave it dense with modules_to_not_convert=[{missed[0]!r}]."
            )
        visitor.leave(index, _drift(waiting) if self.two_streams else None)
        return waiting

    def _probe(self, index: int, pause: _Pause) -> dict[str, _Group]:
        """Run the block once on one sample to see which linears are given the same tensor, and in which order."""
        self._recording = []
        args, kwargs = self._to_device(pause.payload)
        try:
            if pause.state is not None:
                pause.state.restore()
            self._block_forwards[index](*args, **kwargs)
            records = self._recording
        finally:
            self._recording = None
            self._state.restore()
        groups: list[tuple[Tensor, list[str]]] = []
        seen: set[str] = set()
        for name, tensor in records:
            if name in seen:
                raise LockstepError(
                    f"{name} is called more than once in one forward; leave it dense with "
                    f"modules_to_not_convert=[{name!r}]."
                )
            seen.add(name)
            for shared, names in groups:
                if _same_tensor(shared, tensor):
                    names.append(name)
                    break
            else:
                groups.append((tensor, [name]))
        return {name: group for _, names in groups for group in [_Group(tuple(names))] for name in names}

    def _next_group(
        self, index: int, at_linear: dict[tuple[int, str], _Pause]
    ) -> tuple[_Group, dict[tuple[int, str], _Pause]]:
        """The group to solve next, and who waits there.

        Usually all wait at one group. Where the route depends on the token (experts as separate linears) they may
        not; then the group defined first in the block goes first, since whoever could still come to it is there.
        """
        order = {name: i for i, name in enumerate(self.linears[index])}
        names = {str(p.key) for p in at_linear.values()}
        for name in names:
            if name not in order:
                raise LockstepError(
                    f"{name} is called inside decoder block {index}, where it does not belong; leave it dense with "
                    f"modules_to_not_convert=[{name!r}]."
                )
            self._groups.setdefault(name, _Group((name,)))
        groups = {id(self._groups[n]): self._groups[n] for n in names}
        if any(g.solved for g in groups.values()):
            late = next(n for n in names if self._groups[n].solved)
            raise LockstepError(
                f"a sample reaches {late} after it was binarized; its route through the block differs from the "
                f"others'. Leave it dense with modules_to_not_convert=[{late!r}]."
            )
        group = min(groups.values(), key=lambda g: min(order[n] for n in g.names))
        return group, {w: p for w, p in at_linear.items() if self._groups[str(p.key)] is group}

    # -- coroutines ----------------------------------------------------------------------------------------------

    def _forward(self, sample: int) -> _Pause:
        self.model(**self.samples[sample], use_cache=False)
        return _Pause("end of the forward", "")

    def _pause(self, pause: _Pause) -> None:
        pause.state = state = _TorchState.capture()
        self._state.restore()
        self._main.switch(pause)
        state.restore()

    def _resume(self, waiting: dict[tuple[int, str], _Pause]) -> dict[tuple[int, str], _Pause]:
        return {worker: self._greenlet_of[worker].switch() for worker in list(waiting)}

    # -- wrapped forwards ----------------------------------------------------------------------------------------

    @contextmanager
    def _patched(self) -> Iterator[None]:
        self._block_forwards = [block.forward for block in self.blocks]
        originals = [(b, f) for b, f in zip(self.blocks, self._block_forwards, strict=True)]
        for index, block in enumerate(self.blocks):
            block.forward = self._wrap_block(index)
        for block_linears in self.linears:
            for name, linear in block_linears.items():
                originals.append((linear, linear.forward))
                linear.forward = self._wrap_linear(name, linear, linear.forward)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for module, forward in originals:
                if module.__dict__.get("forward") is not None:
                    del module.__dict__["forward"]
                if module.forward != forward:
                    module.forward = forward  # it was patched before us (accelerate's hooks do that)

    def _wrap_block(self, index: int) -> Callable[..., Any]:
        original = self._block_forwards[index]

        def forward(*args: Any, **kwargs: Any) -> Any:
            self._pause(_Pause("block", index, (args, kwargs)))
            home = _first_device((args, kwargs))
            args, kwargs = self._to_device((args, kwargs))
            output = original(*args, **kwargs)
            self._pause(_Pause("end of block", index, output))
            return output if self.device is None or home is None else _map_tensors(output, home)

        return forward

    def _wrap_linear(self, name: str, linear: nn.Linear, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(input: Tensor) -> Any:  # the name it has in nn.Linear, for models that pass it by keyword
            if self._recording is not None:
                self._recording.append((name, input))
                return original(input)
            worker = self._identity[self._current()]
            group = self._groups.get(name)
            if group is None or worker not in group.seen:
                self._pause(_Pause("linear", name, input))
            if worker[1] == DENSE:
                return original(input)
            return nn.functional.linear(input, self._weights[name], linear.bias)

        return forward

    def _to_device(self, call: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self.device is None:
            return call
        return _map_tensors(call[0], self.device), _map_tensors(call[1], self.device)


def _same_tensor(a: Tensor, b: Tensor) -> bool:
    # empty tensors all have the data pointer 0: experts that no token chose do not share an input
    return a is b or (
        a.numel() > 0 and a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
    )


def _device_of(module: nn.Module) -> torch.device | None:
    parameter = next(module.parameters(), None)
    return None if parameter is None else parameter.device


def _first_device(tree: Any) -> torch.device | None:
    if isinstance(tree, Tensor):
        return tree.device
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return next((d for d in map(_first_device, children) if d is not None), None)


def _map_tensors(tree: Any, device: torch.device) -> Any:
    if isinstance(tree, Tensor):
        return tree.to(device)
    if isinstance(tree, dict):
        return {k: _map_tensors(v, device) for k, v in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(_map_tensors(v, device) for v in tree))
    if isinstance(tree, (list, tuple)):
        return type(tree)(_map_tensors(v, device) for v in tree)
    return tree


def _drift(waiting: Mapping[tuple[int, str], _Pause]) -> float:
    """``Σ ‖h − ĥ‖² / Σ ‖h‖²`` of the block's outputs, dense against quantized stream."""
    outputs = {w: (p.payload[0] if isinstance(p.payload, tuple) else p.payload) for w, p in waiting.items()}
    above = below = 0.0
    for (sample, stream), dense in outputs.items():
        if stream == DENSE:
            above += float((dense.float() - outputs[sample, QUANTIZED].float()).square().sum())
            below += float(dense.float().square().sum())
    return above / below if below else 0.0


def _import_greenlet() -> Any:
    try:
        import greenlet
    except ImportError as error:
        raise MissingDependencyError("calibration needs greenlet: pip install 'optimum-sab[quantize]'.") from error
    return greenlet
