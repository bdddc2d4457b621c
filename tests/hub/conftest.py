"""A Hub on this machine for all tests of this folder, and processes that know no other."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from optimum_sab import AutoModelForVision2Seq, SABConfig
from optimum_sab.bench.qwen import random_model
from optimum_sab.example import checkpoint_path
from optimum_sab.hf.processor import load_processor
from optimum_sab.hf.quantizer import SABHfQuantizer
from tests.conftest import start_programs
from tests.hub.loopback import Repository, serve

FOLDER = Path(__file__).parent
MEASURED = {
    "base": {"model": "owner/dense", "revision": "0" * 40, "license": "mit"},
    "calibration_samples": {"samples": 12, "with_pictures": 9},
    "calibration_tokens": {"text": 700, "visual": 400},
    "agreement": {"text": {"kl": 0.25, "top1": 0.875}},
    "verdict": {"level": "care", "words": "usable with care"},
    "block_errors": [[0.125, 0.0625], [0.25, None]],
}


def pytest_collection_modifyitems(items):
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.compat)


@pytest.fixture(scope="session")
def server():
    hub, end = serve()
    yield hub
    end()


@pytest.fixture
def hub(server):
    """An empty Hub."""
    server.repositories.clear()
    server.asked.clear()
    server.uploads_left = float("inf")
    return server


@pytest.fixture(scope="session")
def environment(server, tmp_path_factory):
    """What makes huggingface_hub know this Hub alone."""
    ours = {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path_factory.mktemp("hf-home")),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    return {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))} | ours


@pytest.fixture(scope="session")
def programs(environment, base_python, small_example):
    return start_programs(base_python, "warm", environment, small_example)


@pytest.fixture
def call(hub, programs, environment, tmp_path):
    """``call("optimum-sab", …)`` or ``call("python", "-c", …)``, each a new process with a cache of its own."""

    def run(program, *arguments, token="hf_writer", folder=tmp_path):
        given = {**environment, **({"HF_TOKEN": token} if token else {})}
        command = [programs / program, *map(str, arguments)]
        return subprocess.run(command, env=given, cwd=folder, capture_output=True, text=True, check=False)

    return run


@pytest.fixture
def fresh(hub, environment, tmp_path):
    """``fresh(code)`` in a Python process that has imported nothing."""

    def run(code, *arguments, token="hf_writer"):
        given = {**environment, **({"HF_TOKEN": token} if token else {})}
        command = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.run(command, env=given, cwd=tmp_path, capture_output=True, text=True, check=False)

    return run


def packed_model(seed):
    config = SABConfig(measured=MEASURED)
    model = random_model("tiny", config.layer_settings, torch.device("cpu"), torch.float32, seed)
    model.hf_quantizer = SABHfQuantizer(config)
    model.config.quantization_config = model.hf_quantizer.quantization_config
    return model


@pytest.fixture(scope="session")
def packed(tmp_path_factory):
    """Folders of two small packed models with a processor, of one architecture and with other weights."""
    folders = []
    for seed in (0, 1):
        folder = tmp_path_factory.mktemp(f"packed-{seed}")
        load_processor(checkpoint_path()).save_pretrained(folder)
        packed_model(seed).save_pretrained(folder)
        folders.append(folder)
    return folders


@pytest.fixture(scope="session")
def digests(packed):
    """Of what the two models answer."""
    found = []
    for folder in packed:
        with torch.no_grad():
            logits = AutoModelForVision2Seq.from_pretrained(folder)(input_ids=torch.arange(20, 40)[None]).logits
        found.append(hashlib.sha256(logits.numpy().tobytes()).hexdigest())
    assert found[0] != found[1]
    return found


@pytest.fixture
def put(hub):
    """``put(repo, folder)``: a repository with the files of a folder, as if they had been pushed."""

    def commit(repo, folder, under="", branch="main", private=False):
        found = hub.repositories.setdefault(repo, Repository(private))
        files = {under + path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        return found.commit(branch, {**found.commits.get(found.at(branch), {}), **files})

    return commit
