import ctypes
from pathlib import Path

import pytest
import torch

from optimum_sab.calibration.streams import memory
from optimum_sab.calibration.streams.memory import activation_bytes, free_memory

CPU = torch.device("cpu")


def test_a_7b_model_s_activations_are_its_widest_input_and_four_hidden_states_of_two_bytes():
    found = activation_bytes(tokens=512 * 256, streams=2, width=3584, widest=18944, dtype=torch.bfloat16)
    assert found == 512 * 256 * 2 * 2 * (18944 + 4 * 3584)
    assert found == 2 * activation_bytes(512 * 256, 1, 3584, 18944, torch.float16)
    assert 2 * found == activation_bytes(512 * 256, 2, 3584, 18944, torch.float32)


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
