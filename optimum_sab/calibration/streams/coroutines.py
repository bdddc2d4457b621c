"""Every forward as a coroutine (greenlet) that can be stopped anywhere and keeps PyTorch's modes to itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from optimum_sab.calibration.streams.arrival import Worker
from optimum_sab.calibration.streams.mapped import MappedActivations
from optimum_sab.core.parts import part
from optimum_sab.errors import MissingDependencyError


@dataclass
class TorchState:
    """Grad mode and autocast are thread-local and greenlets share a thread: carried along at every switch."""

    grad: bool
    autocast: dict[str, tuple[bool, torch.dtype]]

    @classmethod
    def capture(cls) -> TorchState:
        """What holds now."""
        kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        return cls(
            torch.is_grad_enabled(),
            {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds},
        )

    def restore(self) -> None:
        """Let it hold again."""
        torch.set_grad_enabled(self.grad)
        for kind, (enabled, dtype) in self.autocast.items():
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)


@dataclass
class Pause:
    """Why a coroutine handed over: at a block's entry, at a linear, at a block's end, at the head, or at its own end.

    A coroutine at a block's end goes on with the payload, whatever it is by then.
    """

    kind: str
    key: int | str
    payload: Any = None
    state: TorchState | None = None  # the coroutine's own, to run its block in its place

    def __str__(self) -> str:
        return f"{self.kind} {self.key}".strip()


class Coroutines:
    """One coroutine per worker, all driven from where this is made.

    Args:
        workers: their names.
        forward: what each runs, given its sample's index; its return value is its last pause.
        mapped: what bounds the memory of those that wait; None for no bound.
    """

    def __init__(
        self, workers: Sequence[Worker], forward: Callable[[int], Pause], mapped: MappedActivations | None = None
    ) -> None:
        self._mapped = mapped
        self._greenlet = import_greenlet()
        self._main = self._greenlet.getcurrent()
        self._own = TorchState.capture()
        self._of = {worker: self._greenlet.greenlet(forward) for worker in workers}
        self._names = {each: worker for worker, each in self._of.items()}

    @property
    def workers(self) -> list[Worker]:
        """All of them, in order."""
        return list(self._of)

    @property
    def current(self) -> Worker | None:
        """The one this is called from; None outside of them."""
        return self._names.get(self._greenlet.getcurrent())

    def start(self) -> dict[Worker, Pause]:
        """Run each to its first pause."""
        with part("forward"):
            return {worker: self.begin(worker) for worker in self._of}

    def begin(self, worker: Worker) -> Pause:
        """Run one to its first pause."""
        return self._switch(worker, worker[0])

    def go_on(self, worker: Worker) -> Pause:
        """Run one to its next pause."""
        return self._switch(worker)

    def _switch(self, worker: Worker, *sample: int) -> Pause:
        pauses: list[Pause] = []
        bounded = self._mapped.going_on(worker, lambda: pauses[0].payload) if self._mapped else nullcontext()
        with bounded:
            pauses.append(self._of[worker].switch(*sample))
        return pauses[0]

    def resume(self, workers: Iterable[Worker]) -> dict[Worker, Pause]:
        """Run some to their next pauses."""
        with part("forward"):
            return {worker: self.go_on(worker) for worker in list(workers)}

    def ended(self, worker: Worker) -> bool:
        """Whether its forward is over."""
        return bool(self._of[worker].dead)

    def pause(self, pause: Pause) -> None:
        """Called inside a coroutine: hand over, and return when it is to go on."""
        pause.state = state = TorchState.capture()
        self._own.restore()
        self._main.switch(pause)
        state.restore()

    def restore(self) -> None:
        """Let the modes hold that held where the coroutines were made."""
        self._own.restore()

    def close(self) -> None:
        """End all that are not at their end: their forwards are left, ``finally`` blocks included."""
        for each in self._of.values():
            if not each.dead:
                each.throw(self._greenlet.GreenletExit)
        self._own.restore()


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
