"""`bench quantize` at tiny size: every stage and part is there, and adds up."""

import json
import time

import pytest
import torch

from optimum_sab.bench.parts import PartWatch, forget_peak, peak_memory
from optimum_sab.bench.quantize import Part, QuantizingConditions, measure_random
from optimum_sab.cli.main import main
from optimum_sab.core.parts import part, watched_by
from optimum_sab.hf.config import SABConfig

CPU = torch.device("cpu")
TINY = ["bench", "quantize", "--size", "tiny", "--samples", "3", "--length", "12", "--device", "cpu"]


@pytest.fixture(autouse=True)
def small(small_machine):
    """The copy that measures bandwidth is small."""


def named(parts):
    return {each.name: each for each in parts}


def test_a_watch_adds_up_what_lies_inside_of_what():
    watch = PartWatch(CPU)
    with watched_by(watch), part("outer"):
        time.sleep(0.02)
        for _ in range(2):
            with part("inner"):
                time.sleep(0.03)
    with part("unseen"):
        pass
    assert list(watch.used) == [("outer",), ("outer", "inner")]
    outer, inner = watch.used.values()
    assert (outer.calls, inner.calls) == (1, 2)
    assert 0.02 <= outer.seconds < 0.05 <= inner.seconds
    assert inner.cpu_seconds < inner.seconds


def test_a_part_that_fails_has_ended():
    watch = PartWatch(CPU)
    with watched_by(watch):
        with pytest.raises(ValueError), part("a"):
            raise ValueError
        with part("b"):
            pass
    assert list(watch.used) == [("a",), ("b",)]


def test_peak_memory_counts_what_was_in_use_and_forgets_it():
    forget_peak(CPU)
    before = peak_memory(CPU)
    if not before:
        pytest.skip("this system does not tell")
    torch.ones(64 << 20, dtype=torch.uint8)
    assert peak_memory(CPU) >= before + (60 << 20)
    forget_peak(CPU)
    assert peak_memory(CPU) < before + (32 << 20)


def test_parts_add_up():
    conditions = QuantizingConditions(SABConfig(progress="none", calibration_samples=3), CPU, torch.float32)
    report = measure_random("tiny", 3, 12, conditions)
    stages = named(report.parts)
    assert next(iter(stages)) == "samples" and {"sensitivities", "allocation", "blocks", "temperature"} <= set(stages)
    inside = named(stages["blocks"].inside)
    assert {"forward", "statistics", "factorization", "alternating fit", "feedback", "descent", "refit"} <= set(inside)
    assert inside["statistics"].use.calls == 2 * 4  # two blocks of four groups
    for each in stages.values():
        assert isinstance(each, Part)
        assert each.seconds == pytest.approx(each.use.seconds + sum(other.seconds for other in each.inside))
    assert 0 < report.error < 1
    assert report.error == measure_random("tiny", 3, 12, conditions).error


def test_json_holds_stages_with_their_parts(capsys):
    assert main([*TINY, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == "tiny" and found["samples"] == 3 and found["environment"]["threads"] >= 1
    assert found["seconds"] == pytest.approx(sum(stage["seconds"] for stage in found["stages"]))
    assert found["peak_memory_bytes"] == max(stage["peak_memory_bytes"] for stage in found["stages"])
    blocks = next(stage for stage in found["stages"] if stage["name"] == "blocks")
    memory = {"peak_memory_bytes", "own_memory_bytes", "mapped_memory_bytes"}
    assert {"name", "seconds", "cpu_seconds", *memory, "calls", "inside"} == set(blocks["inside"][0])
    if found["peak_memory_bytes"]:
        assert 0 < found["own_memory_bytes"] <= found["peak_memory_bytes"] and found["mapped_memory_bytes"] > 0


def test_a_checkpoint_is_loaded_quantized_and_saved(small_example, capsys):
    asked = ["bench", "quantize", str(small_example), "--samples", "4", "--length", "32", "--device", "cpu"]
    assert main(asked) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split("  ")[0] for line in lines]
    assert names[1] == "loading" and "blocks" in names and names[-3] == "saving" and names[-2] == "in all"


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        (["bench", "quantize"], "--size"),
        ([*TINY, "folder"], "--size"),
        (["bench", "quantize", "--size", "huge", "--device", "cpu"], "'huge' must be one of smollm2, 7b-block, tiny"),
        ([*TINY[:4], "--samples", "0", "--device", "cpu"], "--samples 0 must be at least 1"),
    ],
)
def test_wrong_calls_are_refused(asked, named, capsys):
    assert main(asked) != 0
    assert named in capsys.readouterr().err
