"""Shared by all tests: no network, and no surprises from the machine's thread count."""

import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers side by side would wait for each other's threads
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # or each process keeps others, which import torch too
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from tests.speed.interpreter import quicken

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by triton when a kernel is defined
if "PYTEST_XDIST_WORKER" not in os.environ:
    # The process that hands out tests reads what workers warn of in a thread for each, which imports the modules that
    # the warnings are of: two threads that begin at opposite ends of packages that import each other wait for ever.
    for name in ("optimum_sab.hf", "peft"):
        if find_spec(name.partition(".")[0]):
            import_module(name)
else:
    gc.disable()  # until all is imported and collected: it stays, and looking for garbage in it takes a second


# so that no worker is left alone with them at the end
FIRST = ("test_documentation.py", "test_compile.py", "test_linear.py", "test_operator.py", "test_quantizer.py")


def pytest_configure(config):
    config.option.loadscopereorder = False  # pytest-xdist would begin with the files of many tests, which are short


def pytest_collection_finish():
    gc.freeze()
    gc.enable()
    if os.environ.get("TRITON_INTERPRET") == "1" and "triton.runtime.interpreter" in sys.modules:
        quicken()


def pytest_collection_modifyitems(items):
    """The longest come first; those marked gpu are skipped, by name and reason, where there is no CUDA device."""
    items.sort(key=lambda item: item.path.name not in FIRST)
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
    from torch.optim import _muon

    real = _muon._zeropower_via_newtonschulz

    def orthogonalized(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
            return real(*arguments)

    monkeypatch.setattr(_muon, "_zeropower_via_newtonschulz", orthogonalized)


@pytest.fixture(scope="session")
def warm(small_example):
    """A folder for the front of PATH: `optimum-sab`, `optimum-cli` and `python` there need not import anything."""
    with warm_programs(small_example, os.environ) as folder:
        yield folder


@pytest.fixture(scope="session")
def bare_python():
    """A `python` that has imported what Transformers imports, and neither Transformers nor this package."""
    with warm_programs(None, os.environ) as folder:
        yield folder / "python"


@contextmanager
def warm_programs(example, environment):
    """The folder of `warm`, or of `bare_python` without an example; the environment is what an import sees."""
    here = Path(__file__).parent / "speed"
    with tempfile.TemporaryDirectory() as name:  # the path of a socket must be short
        folder = Path(name)
        for program in ("optimum-sab", "optimum-cli", "python"):
            (folder / program).write_text(f"#!{sys.executable} -IS\n{(here / 'client.py').read_text()}")
            (folder / program).chmod(0o755)
        command = [sys.executable, here / "server.py", folder / "socket", *([example] if example else [])]
        server = subprocess.Popen(command, env=environment)
        try:
            while not (folder / "socket").exists():
                assert server.poll() is None, "the server has ended"
                time.sleep(0.05)
            yield folder
        finally:
            server.kill()
            server.wait()
