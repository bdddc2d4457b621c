"""A process that has imported much, and forks for every command that it is handed.

    python server.py KIND SOCKET OWNER [EXAMPLE]

KIND is `base`, which has imported torch and nothing that reads the environment for Transformers; `bare`, which has all
that Transformers imports, and neither Transformers nor this package, for what depends on the order of imports; or
`warm`, which has Transformers and this package too. The latter two are started by a fork of the first. EXAMPLE is what
commands of `warm` take for the embedded example, unless their environment has another in EXAMPLE_VLM, and they are
given the first FEW built-in samples where they ask for more. It serves until the process OWNER has ended.

Of several seconds of a command that is run here nearly all are imports. A fork of a process that has done them, and
nothing else, is as good as a new process: no model was loaded, no thread was started, no generator was seeded. What is
read from the environment while something is imported is as it was when the server began.

`client.py` is what stands on PATH as `optimum-sab`, `optimum-cli` or `python`.
"""

import atexit
import gc
import importlib
import importlib.metadata
import importlib.util
import json
import os
import runpy
import shutil
import signal
import socket
import sys
import threading
import traceback
import types
from pathlib import Path

# what commands import when they run
LATE = (
    "accelerate",
    "greenlet",
    "optimum.commands",
    "optimum_sab.bench.generate",
    "optimum_sab.bench.kernels",
    *(
        f"optimum_sab.cli.commands.{name}"
        for name in ("bench", "demo", "env", "eval", "example", "inspect", "quantize", "report")
    ),
    "optimum_sab.cli.main",
    "optimum_sab.eval.quality",
    "optimum_sab.example.demonstration",
    "optimum_sab.hf.binarization",
    "PIL.Image",
    "torch._dynamo",
    "torch.testing",
    "transformers.generation.utils",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
)


FEW = 64  # thousands of tokens, for linears of at most 256 inputs


IMPORTED = {
    "base": ("jinja2", "PIL.Image", "regex", "safetensors.torch", "torch._dynamo", "yaml"),
    "bare": ("accelerate", "huggingface_hub"),  # two thirds of the time of importing a model of Transformers
    "warm": LATE,
}


def start(kind: str, path: str, owner: str, example: str = "") -> None:
    """Import what belongs to the kind, and return when a fork of this process serves."""
    sys.path[:] = [each for each in sys.path if each]  # but the folder that it was started in
    if kind == "warm":
        importlib.import_module("optimum_sab.example").checkpoint_path = lambda: Path(
            os.environ.get("EXAMPLE_VLM", example)
        )
        give_few()
    for name in IMPORTED[kind]:
        importlib.import_module(name)
    if kind != "warm":
        assert not {"transformers", "optimum_sab", "peft"} & set(sys.modules)
    elif os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
        runpy.run_path(str(Path(__file__).with_name("interpreter.py")))["quicken"]()
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(path)
    listening.listen()
    gc.collect()
    gc.freeze()  # no command looks for garbage in it, or writes to its pages
    if os.fork() == 0:
        try:
            serve(listening, int(owner))
        finally:
            shutil.rmtree(Path(path).parent, ignore_errors=True)
            os._exit(0)


def serve(listening: socket.socket, owner: int) -> None:
    """Fork for each command until the owner has ended."""
    before = signal.signal(signal.SIGCHLD, bury)
    listening.settimeout(0.5)
    while True:
        try:
            connection, _ = listening.accept()
        except TimeoutError:
            try:
                os.kill(owner, 0)
            except ProcessLookupError:
                return
            continue
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, before)
            listening.close()
            try:
                keep(connection)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        connection.close()


def give_few() -> None:
    """Let a run that asks for many built-in samples, as it does by default, have the first of them."""
    reading = importlib.import_module("optimum_sab.calibration.samples.reading")
    many = reading.builtin_samples
    reading.builtin_samples = lambda count, *given: many(min(count, FEW), *given)


def bury(*_: object) -> None:
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                return
        except ChildProcessError:
            return


def keep(connection: socket.socket) -> None:
    """Run one command in a fork and say how it ended."""
    received, files, _, _ = socket.recv_fds(connection, 4, 3)
    for place, file in enumerate(files):
        os.dup2(file, place)
        os.close(file)
    rest = connection.makefile("rb").read(int.from_bytes(received, "little"))
    command = json.loads(rest)
    child = os.fork()
    if child == 0:
        connection.close()
        run(**command)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    connection.sendall(status.to_bytes(2, "little", signed=True))
    os._exit(0)


def run(called: str, arguments: list[str], folder: str, environment: dict[str, str]) -> None:
    """Be the program that is called so; never returns."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
    at_once = bool(environment.get("PYTHONUNBUFFERED"))
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    sys.stdout.reconfigure(write_through=at_once)
    sys.stderr.reconfigure(write_through=True, errors="backslashreplace")
    sys.executable = str(Path(called).with_name("python"))  # of which it may start more
    sys.argv = [called, *arguments]
    sys.modules["__main__"] = types.ModuleType("__main__")
    status = 1
    try:
        PROGRAMS[Path(called).name](arguments)
        status = 0
    except SystemExit as stopped:
        status = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
        if isinstance(stopped.code, str):
            sys.stderr.write(f"{stopped.code}\n")
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(status)


def python(arguments: list[str]) -> None:
    match arguments:
        case ["-c", code, *rest]:
            sys.argv = ["-c", *rest]
            sys.path.insert(0, "")
            exec(compile(code, "<string>", "exec"), sys.modules["__main__"].__dict__)
        case ["-m", module, *rest]:
            sys.argv = ["-m", *rest]
            sys.path.insert(0, os.getcwd())
            sys.modules.pop(module, None)
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case _:
            raise NotImplementedError(f"python {arguments} is not served; run the real one")


def entry_point(name: str):
    """The program that is installed under this name."""

    def program(_: list[str]) -> None:
        [found] = importlib.metadata.entry_points(group="console_scripts", name=name)
        sys.exit(found.load()())

    return program


PROGRAMS = {"python": python, "optimum-sab": entry_point("optimum-sab"), "optimum-cli": entry_point("optimum-cli")}

if __name__ == "__main__":
    start(*sys.argv[1:])
