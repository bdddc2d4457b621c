"""Shared by all tests: no network, and no surprises from the machine's thread count."""

import fcntl
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers side by side would wait for each other's threads
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # or each process keeps others, which import torch too
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from tests.speed.interpreter import quicken

ROOT = Path(__file__).parents[1]
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")  # of pytest-xdist: gw0, gw1, …
if WORKER:
    gc.disable()  # until all is imported and collected: it stays, and looking for garbage in it takes a second

# so that no worker is left alone with them at the end
FIRST = ("test_documentation.py", "test_compile.py", "test_linear.py", "test_operator.py", "test_quantizer.py")


def pytest_addoption(parser, pluginmanager):
    """Before the other conftest.py are imported. The process that only hands out tests imports nothing for them."""
    given = pluginmanager.get_plugin("pytestconfig").known_args_namespace
    if not WORKER and getattr(given, "numprocesses", 0):
        return
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read by triton when a kernel is defined


def pytest_configure(config):
    config.option.loadscopereorder = False  # pytest-xdist would begin with the files of many tests, which are short


@pytest.hookimpl(tryfirst=True)
def pytest_warning_recorded(warning_message):
    """Send what a worker warns of as the nearest of Python's own classes.

    The process that hands out tests imports the class, which takes seconds, and each worker's in a thread of its own:
    two that begin at opposite ends of packages that import each other wait for ever.
    """
    kind = warning_message.category
    if not WORKER or kind.__module__ in ("builtins", "pytest"):
        return
    own = next(each for each in kind.__mro__ if each.__module__ == "builtins")
    warning_message.message = own(f"{kind.__module__}.{kind.__qualname__}: {warning_message.message}")
    warning_message.category = own


class Backwards(pytest.Dir):
    """Read from its end, in one of two workers: what one of them has rewritten for pytest's `assert`, another finds."""

    def collect(self):
        return reversed(list(super().collect()))


def pytest_collect_directory(path, parent):
    return Backwards.from_parent(parent, path=path) if WORKER[-1:] in tuple("13579") else None


def pytest_collection_finish():
    gc.freeze()
    gc.enable()
    if os.environ.get("TRITON_INTERPRET") == "1" and "triton.runtime.interpreter" in sys.modules:
        quicken()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """The longest come first, in every worker; those marked gpu are skipped, by name and reason, where there is no CUDA
    device."""
    import torch

    items.sort(key=lambda item: (item.path.name not in FIRST, item.path.parts if WORKER else ()))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


TOWER, WIDTH = 1, 256  # of the small example: blocks of the tower, rows of gate and up


@pytest.fixture(scope="session")
def small_example(tmp_path_factory):
    """The embedded example with the first two of its blocks, of each a third of the MLP, in float32.

    Its files, its pictures, an eighth of its work, and no bfloat16, which many CPUs multiply tens of times slower.
    """
    return cut_example(tmp_path_factory.mktemp("small") / "example-vlm", blocks=2)


@pytest.fixture(scope="session")
def smallest_example(tmp_path_factory):
    """With one block, for runs of many samples."""
    return cut_example(tmp_path_factory.mktemp("smallest") / "example-vlm", blocks=1)


def cut_example(folder, blocks):
    from safetensors.torch import load_file, save_file

    from optimum_sab.example import checkpoint_path

    shutil.copytree(checkpoint_path(), folder)
    config = json.loads((folder / "config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]
    text["num_hidden_layers"], text["intermediate_size"] = blocks, WIDTH
    vision["depth"], vision["fullatt_block_indexes"] = TOWER, list(range(TOWER))
    for part in (config, text, vision):
        part["dtype"] = "float32"
    if "layer_types" in text:
        text["layer_types"] = text["layer_types"][:blocks]
    (folder / "config.json").write_text(json.dumps(config))
    kept = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        for place, count in ((".layers.", blocks), ("visual.blocks.", TOWER)):
            if place in name and int(name.split(place)[1].split(".")[0]) >= count:
                break
        else:
            if ".layers." in name and ".mlp." in name:
                tensor = tensor[:, :WIDTH] if "down_proj" in name else tensor[:WIDTH]
            kept[name] = tensor.float().contiguous()
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def shut():
    """A folder that everyone may pass and nobody but root may list, one below it that may not be passed either; and a
    context without root's rights."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        passed, barred = Path(name, "passed"), Path(name, "barred")
        for folder, mode in ((passed, 0o711 if os.geteuid() == 0 else 0o311), (barred, 0o000)):
            folder.mkdir()
            (folder / "data.jsonl").write_text('{"text": "a"}\n')
            folder.chmod(mode)
        yield SimpleNamespace(passed=passed, barred=barred, entered=_without_rights)
        for folder in (passed, barred):
            folder.chmod(0o700)


@contextmanager
def _without_rights():
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if user == 0:
            os.seteuid(0)


@pytest.fixture
def quick_muon(monkeypatch):
    """Muon that computes in float32 what it computes in bfloat16, which many CPUs multiply tens of times slower."""
    import torch
    from torch.optim import _muon

    real = _muon._zeropower_via_newtonschulz

    def orthogonalized(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
            return real(*arguments)

    monkeypatch.setattr(_muon, "_zeropower_via_newtonschulz", orthogonalized)


@pytest.fixture(scope="session")
def base_python(tmp_path_factory):
    """A `python` that has imported torch, for all workers: the others below are forks of it."""
    return _once("base", tmp_path_factory, lambda: start_programs(sys.executable, "base", os.environ)) / "python"


@pytest.fixture(scope="session")
def bare_python(base_python, tmp_path_factory):
    """A `python` that has imported what Transformers imports, and neither Transformers nor this package."""
    return _once("bare", tmp_path_factory, lambda: start_programs(base_python, "bare", os.environ)) / "python"


@pytest.fixture(scope="session")
def warm(base_python, small_example, tmp_path_factory):
    """A folder for the front of PATH: `optimum-sab`, `optimum-cli` and `python` there need not import anything."""
    return _once("warm", tmp_path_factory, lambda: start_programs(base_python, "warm", os.environ, small_example))


def _once(name, tmp_path_factory, start):
    """The folder that ``start`` returns, called by the first worker that asks for it."""
    common = tmp_path_factory.getbasetemp()
    if WORKER:
        common = common.parent
    place = common / f"{name}-programs"
    with (common / f"{name}-lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():
            place.write_text(str(start()))
    return Path(place.read_text())


def start_programs(python, kind, environment, example=""):
    """The folder with programs of a kind (tests/speed/server.py); the environment is what an import sees.

    They are there until the tests end, all workers' tests.
    """
    here = Path(__file__).parent / "speed"
    folder = Path(tempfile.mkdtemp())  # the path of a socket must be short
    for program in ("optimum-sab", "optimum-cli", "python"):
        (folder / program).write_text(f"#!{sys.executable} -IS\n{(here / 'client.py').read_text()}")
        (folder / program).chmod(0o755)
    owner = os.getppid() if WORKER else os.getpid()
    code = f"import runpy; runpy.run_path({str(here / 'server.py')!r}, run_name='__main__')"
    command = [python, "-c", code, kind, str(folder / "socket"), str(owner), str(example)]
    subprocess.run(command, env=environment, check=True)
    return folder
