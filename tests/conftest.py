"""Shared by all tests: no network, and no surprises from the machine's thread count."""

import json
import os
import shutil

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers side by side would wait for each other's threads
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by triton when a kernel is defined


# so that no worker is left alone with them at the end
FIRST = ("test_documentation.py", "test_main.py", "test_training.py", "test_compile.py")


def pytest_configure(config):
    config.option.loadscopereorder = False  # pytest-xdist would begin with the files of many tests, which are short


def pytest_collection_modifyitems(items):
    """The longest come first; those marked gpu are skipped, by name and reason, where there is no CUDA device."""
    items.sort(key=lambda item: item.path.name not in FIRST)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def small_example(tmp_path_factory):
    """The embedded example with the first two of its decoder blocks, in float32: its files, its pictures, a third of
    its work, and no bfloat16, which many CPUs multiply tens of times slower."""
    from safetensors.torch import load_file, save_file

    from optimum_sab.example import checkpoint_path

    folder = tmp_path_factory.mktemp("small") / "example-vlm"
    shutil.copytree(checkpoint_path(), folder)
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    blocks, text["num_hidden_layers"] = text["num_hidden_layers"], 2
    for part in (config, *(each for each in config.values() if isinstance(each, dict))):
        if "dtype" in part:
            part["dtype"] = "float32"
    if "layer_types" in text:
        text["layer_types"] = text["layer_types"][:2]
    (folder / "config.json").write_text(json.dumps(config))
    left_out = tuple(f".layers.{index}." for index in range(2, blocks))
    kept = {n: t for n, t in load_file(folder / "model.safetensors").items() if not any(each in n for each in left_out)}
    save_file({n: t.float() for n, t in kept.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
