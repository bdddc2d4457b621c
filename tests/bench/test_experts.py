"""`bench kernels` of experts: fields and their relations, what is refused, and that a wrong kernel is caught."""

import json

import pytest
import torch

from optimum_sab.bench.conditions import Conditions
from optimum_sab.bench.experts import TOKENS, compare_experts
from optimum_sab.bench.random_experts import PackedExperts, dense_experts, with_implementation
from optimum_sab.bench.shapes import ExpertsShape, parse_experts
from optimum_sab.cli.main import main
from optimum_sab.core.settings import LayerSettings
from optimum_sab.errors import ConfigError, MissingDependencyError
from optimum_sab.format.layout import stored_bits_per_weight

moe = pytest.importorskip("transformers.integrations.moe", reason="experts of Transformers 5")
CPU = torch.device("cpu")
SMALL = ExpertsShape("small", 8, 2, 160, 96)
QUICK = ["bench", "kernels", "--device", "cpu", "--repeats", "2", "--shapes", "8x2x160x96"]


def routed(tokens, shape=SMALL, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    weights, index = torch.rand(tokens, shape.experts, generator=generator).topk(shape.top_k)
    return torch.randn(tokens, shape.hidden, generator=generator).to(dtype), index, weights.to(dtype)


def test_bench_rows_of_experts_are_consistent(small_machine, capsys):
    assert main([*QUICK, "48x200", "--tokens", "1", "3", "--code", "trellis16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(row["out_features"], row["m"]) for row in found["rows"]] == [(48, 1), (48, 3)]
    assert [row["m"] for row in found["experts"]] == [1, 3]
    stored = sum(stored_bits_per_weight(*size, LayerSettings()) * size[0] * size[1] for size in ((192, 160), (160, 96)))
    for row in found["experts"]:
        assert row["packed_bytes"] == pytest.approx(8 * stored / 8)
        assert row["dense_bytes"] == 8 * 3 * 160 * 96 * 2
        assert row["bits_per_weight"] == pytest.approx(stored / (3 * 160 * 96))
        timed = row["implementation_seconds"]
        assert row["dense_seconds"] == min(timed.values()) == timed[row["dense_implementation"]]
        assert row["speedup"] == pytest.approx(row["dense_seconds"] / row["seconds"])
        assert row["coded_seconds"] > 0 and 0 <= row["error"] < 1e-2
        assert 2 <= row["active"] <= min(8, 2 * row["m"])
    assert list(found["experts"][0]["implementation_seconds"]) == ["eager", "batched_mm", "grouped_mm"]
    assert list(found["experts"][1]["implementation_seconds"]) == ["eager", "grouped_mm"]  # six pairs of eight experts


def test_bench_prints_a_table_of_experts(small_machine, capsys):
    assert main([*QUICK, "--tokens", "2"]) == 0
    head, row, last = capsys.readouterr().out.strip().splitlines()
    assert "speedup" in head and "fastest" in head and "coded" not in head
    assert row.split()[:3] == ["8x2x160x96", "8x2x160x96", "2"]
    assert "backend" in last


def test_dense_implementations_compute_the_same():
    module = dense_experts(SMALL, Conditions(LayerSettings(), CPU, torch.float32))
    for parameter in module.parameters():
        assert bool(parameter.isfinite().all()) and parameter.dtype is torch.float32
        parameter.mul_(torch.arange(1.0, 9.0)[:, None, None])  # experts differ
    eager, batched, grouped = (
        with_implementation(module, name, *routed(5)) for name in ("eager", "batched_mm", "grouped_mm")
    )
    torch.testing.assert_close(batched, eager)
    torch.testing.assert_close(grouped, eager)


def test_packed_experts_compute_what_the_module_does_with_their_dense_weights():
    packed = PackedExperts(SMALL, LayerSettings(), 0, CPU)
    x, index, weights = routed(5)
    identity = [torch.eye(size)[:, None, :].expand(-1, 8, -1).reshape(-1, size) for size in (160, 96)]
    every = torch.arange(8)
    module = dense_experts(SMALL, Conditions(LayerSettings(), CPU, torch.float32))
    for name, multiply, eye in (
        ("gate_up_proj", packed._gate_up, identity[0]),
        ("down_proj", packed._down, identity[1]),
    ):
        columns = multiply(eye, every.repeat(len(eye) // 8), 1)
        getattr(module, name).copy_(columns.view(-1, 8, columns.shape[1]).permute(1, 2, 0))
    torch.testing.assert_close(packed(x, index, weights), with_implementation(module, "eager", x, index, weights))


@pytest.mark.parametrize("name", ["scaled", "one token", "nan"])
def test_bench_refuses_to_time_wrong_experts(small_machine, monkeypatch, capsys, name):
    right = PackedExperts.__call__

    def wrong(self, x, index, weights):
        out = right(self, x, index, weights)
        if self.backend == "reference":
            return out
        if name == "scaled":
            return out * 1.05
        return torch.cat([out[:-1], -out[-1:] if name == "one token" else torch.full_like(out[-1:], torch.nan)])

    monkeypatch.setattr(PackedExperts, "__call__", wrong)
    assert main([*QUICK, "--tokens", "3"]) == 1
    assert "experts 8x2x160x96, 3 tokens: the result is off by" in capsys.readouterr().err


def test_parse_experts_knows_models_and_sizes():
    found, others = parse_experts(["qwen3-235b-a22b", "64x32", "4x2x64x32", "qwen3-30b-a3b", "qwen2.5-vl-7b"])
    assert [(e.experts, e.top_k, e.hidden, e.intermediate) for e in found] == [
        (128, 8, 4096, 1536),
        (4, 2, 64, 32),
        (128, 8, 2048, 768),
    ]
    assert others == ["64x32", "qwen2.5-vl-7b"]


@pytest.mark.parametrize("word", ["0x0x8x8", "4x0x8x8", "4x5x8x8", "4x2x0x8", "4x2x8x0"])
def test_parse_experts_names_what_is_none(word):
    with pytest.raises(ConfigError, match=word):
        parse_experts([word])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "--tokens 0"),
        (["--repeats", "0"], "--repeats 0"),
        (["--busy", "2"], "--busy is for linears, and 8x2x160x96 are experts"),
        (["--int4"], "--int4 is for linears"),
    ],
)
def test_bench_names_what_experts_do_not_take(small_machine, capsys, arguments, message):
    assert main([*QUICK, *arguments]) == 1
    assert message in capsys.readouterr().err


def test_compare_experts_gives_rows_as_they_come(small_machine):
    seen, conditions = [], Conditions(LayerSettings(), CPU, repeats=1)
    report = compare_experts([SMALL], [1, 3], conditions, on_row=seen.append)
    assert tuple(seen) == report.rows and [row.m for row in seen] == [1, 3]
    assert TOKENS == (1, 16, 256)
    with pytest.raises(ConfigError, match="--busy 2"):
        compare_experts([SMALL], [1], Conditions(LayerSettings(), CPU, busy=2))


def test_transformers_without_implementations_is_named(monkeypatch):
    monkeypatch.delattr(moe, "ALL_EXPERTS_FUNCTIONS")
    with pytest.raises(MissingDependencyError, match="has no implementations of experts"):
        compare_experts([SMALL], [1], Conditions(LayerSettings(), CPU, repeats=1))
