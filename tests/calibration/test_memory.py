import warnings

import pytest
import torch

from optimum_sab.calibration import memory
from optimum_sab.calibration.memory import calibration_bytes, free_memory, warn_of_memory
from optimum_sab.calibration.pipeline import binarize
from optimum_sab.core.settings import LayerSettings
from optimum_sab.errors import SABWarning
from optimum_sab.nn.selection import select_linears

CPU = torch.device("cpu")


def test_a_7b_model_s_default_calibration_takes_what_its_activations_take():
    found = calibration_bytes(tokens=512 * 256, streams=2, width=3584, widest=18944, dtype=torch.bfloat16)
    activations = 512 * 256 * 2 * 2 * (18944 + 2 * 3584)
    assert activations < found < 2.1 * activations
    assert found == calibration_bytes(512 * 256, 2, 3584, 18944, torch.float16)
    assert calibration_bytes(2000, 2, 64, 128, torch.float32) - calibration_bytes(0, 2, 64, 128, torch.float32) == (
        2 * (calibration_bytes(2000, 1, 64, 128, torch.float32) - calibration_bytes(0, 1, 64, 128, torch.float32))
    )


def test_free_memory_of_the_cpu_is_known_and_of_meta_is_not():
    assert 2**20 < free_memory(CPU) < 2**50
    assert free_memory(torch.device("meta")) is None


def test_free_memory_is_unknown_without_psutil(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "psutil", None)
    assert free_memory(CPU) is None


@pytest.mark.parametrize(("free", "warned"), [(None, False), (2**30, False), (2**30 - 1, True)])
def test_too_little_memory_is_warned_of_with_the_remedy(monkeypatch, free, warned):
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_memory(2**30, 5000, CPU)
    said = [str(w.message) for w in caught if issubclass(w.category, SABWarning)]
    assert bool(said) == warned
    if warned:
        for part in ("5000 tokens", "1.0 GiB", "cpu", "calibration_samples", "max_pixels"):
            assert part in said[0]


def test_binarizing_asks_for_the_memory_of_its_tokens_and_streams(build, monkeypatch):
    asked = []
    monkeypatch.setattr("optimum_sab.calibration.pipeline.warn_of_memory", lambda *args: asked.append(args))
    for streams, propagation in ((1, 0.0), (2, 0.3)):
        llama = build("llama")
        tokens = sum(s["input_ids"].numel() for s in llama.samples)
        settings = LayerSettings(iterations=1, sweeps=0, propagation=propagation)
        binarize(llama.model, select_linears(llama.model, settings), llama.samples, temperature_scaling=False)
        assert asked.pop() == (calibration_bytes(tokens, streams, 64, 96, torch.float32), tokens, CPU)
