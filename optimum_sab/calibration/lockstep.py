"""Every sample runs the model's own forward once; all wait for each other at every linear that is binarized.

A sample is a coroutine (greenlet) per stream. Target linears and decoder blocks have their ``forward`` wrapped: the
coroutine pauses there and hands its input to the scheduler. When all that will ever come have come, the visitor
binarizes the linears that share this input, and the coroutines go on, the quantized stream through the new weight.
So no code here knows an architecture, each stream is one forward in all, and each linear's calibration input already
carries the error of every linear before it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from optimum_sab.calibration.passage import BlockPassage, Finisher, call_with, hidden_states
from optimum_sab.calibration.patching import patched_forwards
from optimum_sab.calibration.placement import device_of, first_device, map_tensors
from optimum_sab.calibration.residual import ResidualSource, ResidualWatch, read_arguments
from optimum_sab.errors import LockstepError, MissingDependencyError

DENSE, QUANTIZED = "dense", "quantized"


@dataclass(frozen=True)
class Arrival:
    """One coroutine waiting at a linear.

    Attributes:
        sample: the sample's index.
        stream: `DENSE` or `QUANTIZED`.
        inputs: of the linear, [..., tokens, in].
        residual: what the linear's output will be added to, [..., tokens, out]; None where that is not known, or the
            linear is not the only one with this input.
        routed: there are fewer rows than entered the block, as at an expert.
    """

    sample: int
    stream: str
    inputs: Tensor
    residual: Tensor | None = None
    routed: bool = False


class Visitor(Protocol):
    """What the scheduler calls for every block: `enter`, `solve` per group of linears, perhaps `miss`, and `leave`."""

    def enter(self, index: int) -> None: ...

    def solve(self, names: tuple[str, ...], arrivals: Sequence[Arrival]) -> Mapping[str, Tensor]:
        """Binarize the linears that share an input; returns the weight each quantized stream goes on with."""
        ...

    def miss(self, names: Sequence[str]) -> None:
        """Called before `leave` with the linears of the block that no token reached, where there are any."""
        ...

    def leave(self, index: int, drift: float | None) -> None: ...


@dataclass
class _Pause:
    """Why a coroutine handed over: at a block's entry, at a linear, at a block's end, at the head, or at its own end.

    A coroutine at a block's end goes on with the payload, whatever it is by then.
    """

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
    _watch: ResidualWatch | None = field(default=None, init=False)
    _finisher: Finisher | None = field(default=None, init=False)
    _unstopped: bool = field(default=False, init=False)  # no one waits at linears
    _residuals: dict[tuple[int, str], dict[ResidualSource, Tensor]] = field(default_factory=dict, init=False)

    def run(
        self,
        visitor: Visitor,
        finisher: Finisher | None = None,
        head: nn.Module | None = None,
        to_head: Collection[tuple[int, str]] = (),
    ) -> dict[tuple[int, str], Tensor]:
        """Drive all samples through all blocks.

        Args:
            visitor: what binarizes.
            finisher: what may change a block once it is binarized, or knows it from before.
            head: the output embedding.
            to_head: the streams, as (sample, stream), that go on until it is called.

        Returns:
            What each of ``to_head`` gave to ``head``; those that end without calling it are missing.

        Raises:
            LockstepError: samples disagree about the next block, or one reaches a linear that is already binarized.
        """
        greenlet = import_greenlet()
        self._main = greenlet.getcurrent()
        self._current = greenlet.getcurrent
        streams = (DENSE, QUANTIZED) if self.two_streams else (QUANTIZED,)
        self._finisher = finisher
        with torch.no_grad(), self._patched(head):
            self._state = _TorchState.capture()
            self._workers = [(i, stream) for i in range(len(self.samples)) for stream in streams]
            self._greenlets = [greenlet.greenlet(self._forward) for _ in self._workers]
            self._identity = dict(zip(self._greenlets, self._workers, strict=True))
            self._greenlet_of = dict(zip(self._workers, self._greenlets, strict=True))
            try:
                waiting = {w: g.switch(w[0]) for w, g in zip(self._workers, self._greenlets, strict=True)}
                for index in range(len(self.blocks)):
                    waiting = self._visit_block(index, waiting, visitor)
                return self._finish(to_head if head is not None else ())
            finally:
                for g in self._greenlets:
                    if not g.dead:
                        g.throw(greenlet.GreenletExit)
                self._state.restore()

    # -- one block -----------------------------------------------------------------------------------------------

    def _finish(self, to_head: Collection[tuple[int, str]]) -> dict[tuple[int, str], Tensor]:
        """Let one sample run to its end: what comes back to a block was calibrated on half of its way."""
        at_head: dict[tuple[int, str], Tensor] = {}
        for worker in to_head:
            pause = self._greenlet_of[worker].switch()
            if pause.kind == "head":
                at_head[worker] = pause.payload
            else:
                self._check_end(pause)
        first = self._greenlets[0]
        if not first.dead:
            pause = first.switch()
            self._check_end(first.switch() if pause.kind == "head" else pause)
        return at_head

    def _check_end(self, pause: _Pause) -> None:
        if pause.kind != "end of the forward":
            raise LockstepError(
                f"a sample comes to {pause} again after the last decoder block; models that use a block twice in one "
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
        block, home = self.blocks[index], device_of(self.blocks[index])
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
        entries = waiting if self._finisher is not None else {}
        if self._finisher is not None and self._finisher.known(index):
            self._unstopped = True
            try:
                waiting = self._resume(waiting)
            finally:
                self._unstopped = False
            self._finisher.finish(index, self._passage(index, entries, waiting))
            visitor.leave(index, _drift(waiting) if self.two_streams else None)
            return waiting
        self._groups, sources = self._probe(index, waiting[self._workers[0]])
        entered = {worker: _rows_given(pause.payload) for worker, pause in waiting.items()}
        reached: set[str] = set()
        self._residuals = {worker: {} for worker in self._workers}
        with read_arguments(sources, self._keep_residual):
            waiting = self._resume(waiting)
            while at_linear := {w: p for w, p in waiting.items() if p.kind == "linear"}:
                group, here = self._next_group(index, at_linear)
                source = sources.get(group.names[0]) if len(group.names) == 1 else None
                arrivals = [
                    Arrival(*w, p.payload, self._residual(w, source), _rows(p.payload) < entered[w])
                    for w, p in here.items()
                ]
                if any(_rows(a.inputs) for a in arrivals if a.stream == QUANTIZED):
                    self._weights.update(visitor.solve(group.names, arrivals))
                    reached.update(group.names)
                else:  # the dense stream's alone, or nothing: some models call experts that no token chose all the same
                    self._weights.update({name: self.linears[index][name].weight for name in group.names})
                group.solved = True
                group.seen.update(here)
                del arrivals
                for pause in here.values():
                    pause.payload = None  # frees the inputs of this group
                waiting.update(self._resume(here))
        self._residuals = {}
        missed = [n for n in self.linears[index] if n not in reached]
        if missed:
            visitor.miss(missed)
        if self._finisher is not None:
            self._finisher.finish(index, self._passage(index, entries, waiting))
        visitor.leave(index, _drift(waiting) if self.two_streams else None)
        return waiting

    def _passage(
        self, index: int, entries: Mapping[tuple[int, str], _Pause], ends: Mapping[tuple[int, str], _Pause]
    ) -> BlockPassage:
        def run(sample: int, parameters: Mapping[str, Tensor]) -> Any:
            entry, grad = entries[sample, QUANTIZED], torch.is_grad_enabled()
            args, kwargs = self._to_device(entry.payload)
            if entry.state is not None:
                entry.state.restore()
            self._unstopped = True
            torch.set_grad_enabled(grad)
            try:
                return call_with(self.blocks[index], self._block_forwards[index], parameters, args, kwargs)
            finally:
                self._unstopped = False
                self._state.restore()
                torch.set_grad_enabled(grad)

        def dense(sample: int) -> Tensor | None:
            return hidden_states(ends[sample, DENSE].payload) if self.two_streams else None

        def replace(sample: int, output: Any) -> None:
            ends[sample, QUANTIZED].payload = output

        return BlockPassage(self.blocks[index], range(len(self.samples)), run, dense, replace)

    def _keep_residual(self, source: ResidualSource, value: Tensor) -> None:
        worker = self._identity.get(self._current())
        if worker is not None:
            self._residuals[worker][source] = value

    def _residual(self, worker: tuple[int, str], source: ResidualSource | None) -> Tensor | None:
        return None if source is None else self._residuals[worker].get(source)

    def _probe(self, index: int, pause: _Pause) -> tuple[dict[str, _Group], dict[str, ResidualSource]]:
        """Run the block once on one sample.

        That shows which linears are given the same tensor, in which order, and what their outputs are added to.
        """
        self._recording, self._watch = [], ResidualWatch(self.blocks[index])
        args, kwargs = self._to_device(pause.payload)
        try:
            if pause.state is not None:
                pause.state.restore()
            with self._watch.watching():
                self._block_forwards[index](*args, **kwargs)
            records, sources = self._recording, self._watch.sources()
        finally:
            self._recording = self._watch = None
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
        found = {name: group for _, names in groups for group in [_Group(tuple(names))] for name in names}
        return found, sources if self.two_streams else {}

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
    def _patched(self, head: nn.Module | None) -> Iterator[None]:
        self._block_forwards = [block.forward for block in self.blocks]
        forwards: dict[nn.Module, Callable[..., Any]] = {b: self._wrap_block(i) for i, b in enumerate(self.blocks)}
        for linears in self.linears:
            forwards |= {linear: self._wrap_linear(name, linear, linear.forward) for name, linear in linears.items()}
        if head is not None:
            forwards[head] = self._wrap_head(head.forward)
        with patched_forwards(forwards):
            yield

    def _wrap_block(self, index: int) -> Callable[..., Any]:
        original = self._block_forwards[index]

        def forward(*args: Any, **kwargs: Any) -> Any:
            self._pause(_Pause("block", index, (args, kwargs)))
            home = first_device((args, kwargs))
            args, kwargs = self._to_device((args, kwargs))
            # of a block whose result is known, the quantized stream's output comes from whoever knows it
            skipped = self._unstopped and self._identity[self._current()][1] == QUANTIZED
            end = _Pause("end of block", index, None if skipped else original(*args, **kwargs))
            self._pause(end)
            output = end.payload
            return output if self.device is None or home is None else map_tensors(output, home)

        return forward

    def _wrap_linear(self, name: str, linear: nn.Linear, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(input: Tensor) -> Any:  # the name it has in nn.Linear, for models that pass it by keyword
            if self._recording is not None:
                self._recording.append((name, input))
                output = original(input)
                if self._watch is not None:
                    self._watch.output(name, output)
                return output
            if self._unstopped:
                return original(input)
            worker = self._identity[self._current()]
            group = self._groups.get(name)
            if group is None or worker not in group.seen:
                self._pause(_Pause("linear", name, input))
            if worker[1] == DENSE:
                return original(input)
            return nn.functional.linear(input, self._weights[name], linear.bias)

        return forward

    def _wrap_head(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(input: Tensor) -> Any:
            self._pause(_Pause("head", "", input))
            return original(input)

        return forward

    def _to_device(self, call: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self.device is None:
            return call
        return map_tensors(call[0], self.device), map_tensors(call[1], self.device)


def _rows(inputs: Tensor) -> int:
    return inputs.shape[:-1].numel()


def _rows_given(call: tuple[tuple[Any, ...], dict[str, Any]]) -> int:
    """Rows of the hidden states a block is called with, which are the first that holds numbers; 0 without any."""
    args, kwargs = call
    given = (t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.is_floating_point())
    return next((_rows(t) for t in given), 0)


def _same_tensor(a: Tensor, b: Tensor) -> bool:
    # empty tensors all have the data pointer 0: experts that no token chose do not share an input
    return a is b or (
        a.numel() > 0 and a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
    )


def _drift(waiting: Mapping[tuple[int, str], _Pause]) -> float:
    """``Σ ‖h − ĥ‖² / Σ ‖h‖²`` of the block's outputs, dense against quantized stream."""
    outputs = {w: hidden_states(p.payload) for w, p in waiting.items()}
    above = below = 0.0
    for (sample, stream), dense in outputs.items():
        if stream == DENSE:
            above += float((dense.float() - outputs[sample, QUANTIZED].float()).square().sum())
            below += float(dense.float().square().sum())
    return above / below if below else 0.0


def import_greenlet() -> Any:
    """The package that coroutines come from.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import greenlet
    except ImportError as error:
        raise MissingDependencyError("calibration needs greenlet: pip install 'optimum-sab[quantize]'.") from error
    return greenlet
