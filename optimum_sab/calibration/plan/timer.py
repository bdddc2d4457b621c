"""Short trials on a device, timed."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

ENOUGH = 0.15  # seconds for which a product is repeated
PATIENCE = 6.0  # seconds of wall time from which on nothing is repeated more than once
Clocks = tuple[float, float]  # this thread's, or the device's; and the process's


class Timer:
    """Time on a device, the least of several tries: what else runs on the machine makes it longer, never shorter.

    On a CPU it is the processor time of this thread, which takes its share of every product and waits for the others,
    so that a busy machine is measured as if it were idle; or what the process's threads took on average, if that is
    more: where others work while this one has no core.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begun = time.perf_counter()

    @property
    def on_cpu(self) -> bool:
        return self._device.type == "cpu"

    @property
    def late(self) -> bool:
        """Whether patience is at its end."""
        return time.perf_counter() - self._begun > PATIENCE

    def now(self) -> Clocks:
        if self.on_cpu:
            return time.thread_time(), time.process_time()
        torch.accelerator.synchronize(self._device)
        return time.perf_counter(), 0.0

    def between(self, one: Clocks, other: Clocks) -> float:
        """Seconds from one `now` to the other."""
        return max(other[0] - one[0], (other[1] - one[1]) / torch.get_num_threads())

    def rate(self, run: Callable[[], object], count: float) -> float:
        """Of ``count`` operations in a run, per second."""
        begun = self.now()
        run()
        first = self.between(begun, self.now())
        long = first > ENOUGH
        least, spent = (first if long else float("inf")), 0.0  # the first of short ones met cold caches
        while not spent or (spent < ENOUGH and not self.late):
            if long and self.late:
                break
            started = self.now()
            run()
            taken = self.between(started, self.now())
            least, spent = min(least, taken), spent + taken
        return count / max(least, 1e-9)
