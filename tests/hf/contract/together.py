"""Two processes that talk over gloo, and what each of them found."""

import json
import os
import socket
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).parents[3]


def found_by_two(python, module, arguments, folder, seconds=300):
    """What two processes wrote that run ``python -m module ARGUMENTS… RESULT``; none of them outlives the time.

    Args:
        python: the program.
        module: to run.
        arguments: it is given.
        folder: for what they find, as JSON.
        seconds: that both may take.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    processes, logs = [], []
    for rank in range(2):
        environment = {**os.environ, "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""}
        command = [python, "-m", module, *map(str, arguments), folder / f"{rank}.json"]
        logs.append(folder / f"{rank}.log")  # a pipe that nobody reads would stop one that the other waits for
        with open(logs[-1], "w") as log:
            processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT))
    deadline = time.monotonic() + seconds
    try:
        for process, log in zip(processes, logs):
            code = process.wait(timeout=max(0.0, deadline - time.monotonic()))
            assert code == 0, log.read_text()
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
