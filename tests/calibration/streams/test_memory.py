import ctypes
import warnings
from pathlib import Path

import pytest
import torch

from optimum_sab.calibration.streams import memory
from optimum_sab.calibration.streams.memory import calibration_bytes, free_memory, warn_of_memory
from optimum_sab.core.settings import LayerSettings
from optimum_sab.errors import SABWarning
from optimum_sab.nn.selection import select_linears

CPU = torch.device("cpu")


def test_a_7b_model_s_default_calibration_takes_what_its_activations_take():
    found = calibration_bytes(tokens=512 * 256, streams=2, width=3584, widest=18944, dtype=torch.bfloat16)
    activations = 512 * 256 * 2 * 2 * (18944 + 4 * 3584)
    assert activations < found < 2.1 * activations
    assert found == calibration_bytes(512 * 256, 2, 3584, 18944, torch.float16)
    assert calibration_bytes(2000, 2, 64, 128, torch.float32) - calibration_bytes(0, 2, 64, 128, torch.float32) == (
        2 * (calibration_bytes(2000, 1, 64, 128, torch.float32) - calibration_bytes(0, 1, 64, 128, torch.float32))
    )


@pytest.mark.parametrize(
    ("in_features", "out_features", "two", "one"),
    [
        *((18944, 3584, 6, 4), (2049, 1024, 6, 4), (2048, 1024, 9, 4)),
        *((3584, 37888, 9, 4), (1024, 511, 6, 4), (1023, 100, 9, 5)),
    ],
)
def test_matrices_are_fewer_without_a_drift(in_features, out_features, two, one):
    assert memory.matrices(in_features, out_features, 2) == two
    assert memory.matrices(in_features, out_features, 1) == one


def test_free_memory_of_the_cpu_is_known_and_of_meta_is_not():
    assert 2**20 < free_memory(CPU) < 2**50
    assert free_memory(torch.device("meta")) is None


def test_free_memory_is_unknown_without_psutil(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "psutil", None)
    assert free_memory(CPU) is None


def test_what_pytorch_keeps_to_use_again_is_free(monkeypatch):
    for name, value in (("mem_get_info", (100, 1000)), ("memory_reserved", 50), ("memory_allocated", 30)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert free_memory(torch.device("cuda", 0)) == 120


@pytest.mark.parametrize("two_streams", [False, True])
@pytest.mark.parametrize("device", [None, torch.device("cpu:0")])
def test_too_little_memory_is_warned_of_with_the_remedy(build, monkeypatch, two_streams, device):
    llama = build("llama")
    tokens = sum(s["input_ids"].numel() for s in llama.samples)
    needed = calibration_bytes(tokens, 1 + two_streams, 64, 96, torch.float32)
    said = []
    for free in (None, needed, needed - 1):
        monkeypatch.setattr(memory, "free_memory", lambda place, free=free: free)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warn_of_memory(
                llama.model, select_linears(llama.model, LayerSettings()), llama.samples, device, two_streams
            )
        said.append([str(w.message) for w in caught if issubclass(w.category, SABWarning)])
    assert said[:2] == [[], []]
    for part in (f"{tokens} tokens", "GiB", str(device or CPU), "calibration_samples", "max_pixels"):
        assert part in said[2][0]


def test_freed_memory_is_given_back_before_a_wide_linear_is_solved_on_the_cpu(monkeypatch):
    asked = []
    monkeypatch.setattr(memory, "_malloc_trim", lambda: asked.append)
    memory.give_back_heap(memory.WIDE, CPU)
    assert asked == [0]
    memory.give_back_heap(memory.WIDE - 1, CPU)
    memory.give_back_heap(memory.WIDE, torch.device("cuda"))
    assert asked == [0]


def own_memory():
    """Bytes of the process that no file stands behind."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="another C library than glibc")
def test_what_lies_between_pieces_in_use_is_given_back():
    pieces, kept = [torch.ones(7 * 2**20)], []
    pieces.clear()  # 28 MB: from now on pieces up to that come from the heap
    for _ in range(40):
        pieces.append(torch.ones(2**20))
        kept.append(torch.ones(2**15))
    pieces.clear()
    before = own_memory()
    memory.give_back_heap(memory.WIDE, CPU)
    assert own_memory() < before - 50e6
    assert len(kept) == 40
