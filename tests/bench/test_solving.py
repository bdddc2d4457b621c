"""`bench solve-experts` at tiny size: fields and their relations, what both ways found, and what is refused."""

import json
from dataclasses import replace

import pytest
import torch

from optimum_sab.bench.conditions import Conditions
from optimum_sab.bench.shapes import ExpertsShape
from optimum_sab.bench.solving import DISTINCT, _Matrix, agreement, compare_solving, random_experts
from optimum_sab.bench.verification import WrongResultError
from optimum_sab.cli.main import main
from optimum_sab.core.columns import IN_TORCH
from optimum_sab.core.settings import LayerSettings
from optimum_sab.core.solver import solve
from optimum_sab.errors import ConfigError

CPU = torch.device("cpu")
SMALL = ExpertsShape("small", 8, 2, 96, 32)
CONDITIONS = Conditions(LayerSettings(block_size=32), CPU, repeats=1)
QUICK = ["bench", "solve-experts", "--device", "cpu", "--shapes", "8x2x96x32", "--tokens", "40", "--repeats", "1"]


@pytest.fixture(autouse=True)
def small(small_machine):
    """The copy that measures bandwidth is small."""


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_json_holds_both_ways_of_every_matrix(one_thread, capsys):
    assert main([*QUICK, "--experts", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["tokens"], found["repeats"], found["dtype"], found["preset"]) == (40, 1, "bfloat16", "default")
    assert found["environment"]["threads"] == 1
    assert [(row["out_features"], row["in_features"]) for row in found["rows"]] == [(64, 96), (96, 32)]
    for row in found["rows"]:
        one, together = row["one_by_one"], row["together"]
        assert row["experts"] == 3 and row["name"].startswith("8x2x96x32 ")
        assert min(one["seconds"], together["seconds"]) > 0 and min(one["cpu_seconds"], together["cpu_seconds"]) > 0
        assert row["speedup"] == pytest.approx(one["seconds"] / together["seconds"])
        assert row["agreement"] == {"bit_for_bit": True, "differing_signs": 0.0, "error_difference": 0.0}
        assert 0 < row["error"] < 1


def test_a_row_is_printed_for_every_matrix(one_thread, capsys):
    assert main([*QUICK, "--experts", "2"]) == 0
    head, gate_up, down, legend, last = capsys.readouterr().out.strip().splitlines()
    assert "one by one s" in head and "together s" in head and "peak GB" in head
    assert gate_up.split()[1:4] == ["gate/up", "64x96", "2"] and down.split()[1:4] == ["down", "96x32", "2"]
    assert gate_up.split()[-2] == "none" and "differ" in legend
    assert "40 tokens, bfloat16, 1 turn, torch" in last and "1 thread;" in last


def test_experts_are_the_same_again_and_differ_among_each_other():
    matrix = _Matrix("one", 32, 64)
    first, again = (random_experts(matrix, DISTINCT + 1, 20, CONDITIONS) for _ in range(2))
    assert all(map(torch.equal, first.weights, again.weights))
    hessians = [each.hessian for each in first.statistics]
    assert all(map(torch.equal, hessians, (each.hessian for each in again.statistics)))
    assert not torch.equal(first.weights[0], first.weights[DISTINCT])
    assert not torch.equal(hessians[0], hessians[1]) and torch.equal(hessians[0], hessians[DISTINCT])
    assert all(each.half is not None and each.residual.shape == (32, 64) for each in first.statistics)
    assert first.weights[0].dtype is torch.bfloat16
    one, other = first.unfactored().statistics[::DISTINCT]
    assert one.factored(0.1) is not other.factored(0.1)


def test_rows_come_as_they_are_measured():
    seen = []
    report = compare_solving([SMALL], 2, 8, CONDITIONS, on_row=seen.append)
    assert tuple(seen) == report.rows and [row.name for row in seen] == ["small gate/up", "small down"]


def test_what_the_two_ways_found_is_compared():
    experts = random_experts(_Matrix("one", 32, 64), 2, 20, CONDITIONS)
    found = experts.one_by_one(CONDITIONS, IN_TORCH)
    assert agreement(found, list(found), "one").bit_for_bit
    sign = found[1].planes.base_sign.clone()
    sign[0, :4, :8] ^= True
    other = replace(found[1], planes=replace(found[1].planes, base_sign=sign), error=found[1].error * 1.005)
    compared = agreement(found, [found[0], other], "one")
    assert not compared.bit_for_bit
    assert compared.differing_signs == pytest.approx(32 / (32 * 64) / 2)
    assert compared.error_difference == pytest.approx(0.005, rel=1e-6)
    with pytest.raises(WrongResultError, match=r"expert 1 of one has an error of .* solved by itself"):
        agreement(found, [found[0], replace(found[1], error=found[1].error * 1.02)], "one")


def test_a_wrong_result_is_not_timed(monkeypatch, capsys):
    def wrong(weights, statistics, settings, names, loops, room):
        assert room is None  # on a CPU
        return [solve(w, s, settings.replace(base_planes=2), loops=loops) for w, s in zip(weights, statistics)]

    monkeypatch.setattr("optimum_sab.bench.solving.solve_many", wrong)
    assert main(QUICK) == 1
    assert "a time would mean nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        (["--experts", "0"], "--experts 0 must be at least 1"),
        (["--repeats", "0"], "--repeats 0 must be at least 1"),
        (["--tokens", "1"], "--tokens 1 must be at least 2"),
        (["--shapes", "qwen2.5-vl-7b"], "--shapes 'qwen2.5-vl-7b' are no experts"),
        (["--dtype", "int8"], "--dtype 'int8' must be one of"),
    ],
)
def test_wrong_calls_are_refused(asked, named, capsys):
    assert main([*QUICK, *asked]) == 1
    assert named in capsys.readouterr().err


def test_numbers_are_checked_without_the_command_line_too():
    with pytest.raises(ConfigError, match="--experts 0"):
        compare_solving([SMALL], 0, 8, CONDITIONS)
