"""Functions on several ranks, each a process forked from one that has everything imported.

`python -m tests.calibration.ranked` reads requests from its standard input; `Server` is the other end.
"""

import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMEOUT = 100.0  # seconds after which ranks count as hanging


@dataclass
class Outcome:
    """What came of one rank.

    Attributes:
        value: what its function returned.
        error: what it raised.
        code: its exit code; negative for the signal that ended it.
        seconds: until it ended.
    """

    value: Any = None
    error: BaseException | None = None
    code: int = 0
    seconds: float = 0.0


class Server:
    """Runs functions, one after the other.

    Args:
        python: the program, which may have everything imported already (`warm`).
    """

    def __init__(self, python):
        self._process = subprocess.Popen(
            [python, "-m", "tests.calibration.ranked"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_THREAD_LIMIT": "1"},
        )

    def run(self, size, work, *args, environment=None):
        """``work(*args)`` on so many ranks; `Outcome` of each. ``work`` is a function of a module."""
        pickle.dump((size, work, args, environment or {}), self._process.stdin)
        self._process.stdin.flush()
        return pickle.load(self._process.stdout)

    def close(self):
        self._process.stdin.close()
        self._process.wait(30)


def start(rank, size, request, port, place):
    child = os.fork()
    if child:
        return child
    work, args, environment = request
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    if size > 1:
        os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(size), **places})
    os.environ.update(environment)
    os.dup2(2, 1)  # what is printed must not come between the answers
    outcome = Outcome()
    try:
        outcome.value = work(*args)
    except BaseException as error:
        outcome.error = error
        if os.environ.get("SHOW_RANKS"):
            traceback.print_exc()
    try:
        data = pickle.dumps(outcome)
    except Exception:
        data = pickle.dumps(Outcome(error=RuntimeError(repr(outcome.error))))
    place.write_bytes(data)
    sys.stderr.flush()
    os._exit(outcome.error is not None)


def gathered(size, request, folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = [folder / f"{rank}.pickle" for rank in range(size)]
    for place in places:
        place.unlink(missing_ok=True)
    began = time.monotonic()
    children = {start(rank, size, request, port, place): rank for rank, place in enumerate(places)}
    outcomes = [Outcome() for _ in places]
    ended, stopped = {}, set()
    while len(ended) < size:
        if time.monotonic() - began > TIMEOUT:
            for child in children.keys() - ended.keys():
                os.kill(child, signal.SIGKILL)
        for child in list(children.keys() - ended.keys()):
            found, status = os.waitpid(child, os.WNOHANG | os.WUNTRACED)
            if found and os.WIFSTOPPED(status):
                stopped.add(child)
            elif found:
                ended[child] = os.waitstatus_to_exitcode(status), time.monotonic() - began
        if children.keys() - ended.keys() <= stopped:
            for child in stopped - ended.keys():
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    for child, rank in children.items():
        if places[rank].exists():
            outcomes[rank] = pickle.loads(places[rank].read_bytes())
        outcomes[rank].code, outcomes[rank].seconds = ended[child]
    return outcomes


def serve():
    import tempfile

    import torch

    import tests.calibration.rank_work  # noqa: F401

    torch.set_num_threads(1)  # nothing is computed here, so those that are forked begin with no thread, and with one
    folder = Path(tempfile.mkdtemp())
    answers = os.fdopen(os.dup(1), "wb")
    while True:
        try:
            size, *request = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        answers.write(pickle.dumps(gathered(size, request, folder)))
        answers.flush()


if __name__ == "__main__":
    from tests.calibration import ranked

    ranked.serve()
