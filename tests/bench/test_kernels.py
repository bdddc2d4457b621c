"""`bench kernels`: fields and the relations between them, what is refused, and that a wrong kernel is caught."""

import importlib.util
import json
import os
import sys
import types
from pathlib import Path

import pytest
import torch

from optimum_sab.bench.conditions import Conditions
from optimum_sab.bench.kernels import TOKENS, compare_kernels
from optimum_sab.bench.other_linears import CHECKS
from optimum_sab.bench.shapes import LinearShape, model_shapes, parse_shapes
from optimum_sab.bench.verification import TOLERANCE, WrongResultError, check_error, linear_error, relative_error
from optimum_sab.cli.main import main
from optimum_sab.core.settings import LayerSettings
from optimum_sab.errors import ConfigError, MissingDependencyError
from optimum_sab.format.layout import stored_bits_per_weight
from optimum_sab.hf.config import SABConfig
from optimum_sab.nn.linear import SABLinear

CPU = torch.device("cpu")
QUICK = ["bench", "kernels", "--device", "cpu", "--repeats", "3"]


def check_row(row, environment, settings):
    m, out_features, in_features = row["m"], row["out_features"], row["in_features"]
    width = 4 if row["dtype"] == "float32" else 2
    bits = stored_bits_per_weight(out_features, in_features, settings)
    stored = bits * out_features * in_features / 8
    assert row["bits_per_weight"] == pytest.approx(bits)
    assert row["bytes"] == pytest.approx(stored + m * (in_features + out_features) * width)
    assert row["speedup"] == pytest.approx(row["dense_seconds"] / row["seconds"])
    bandwidth = environment["bandwidth_bytes_per_second"]
    assert row["roofline_fraction"] == pytest.approx(row["bytes"] / bandwidth / row["seconds"])
    assert row["rotated_bytes"] % round(stored) == 0 and row["rotated_bytes"] >= stored
    assert row["dense_rotated_bytes"] % (out_features * in_features * width) == 0 and row["dense_rotated_bytes"] > 0
    assert 0 <= row["error"] <= TOLERANCE[getattr(torch, row["dtype"])]
    assert row["device"] == environment["device"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_bench_kernels_rows_are_consistent(small_machine, capsys, dtype):
    command = [*QUICK, "--shapes", "64x256", "48x200", "--tokens", "1", "5", "--dtype", dtype, "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["environment"].keys() >= {"device", "torch", "triton", "python", "threads"}
    rows = found["rows"]
    assert [(r["out_features"], r["in_features"], r["m"]) for r in rows] == [
        (64, 256, 1),
        (64, 256, 5),
        (48, 200, 1),
        (48, 200, 5),
    ]
    for row in rows:
        check_row(row, found["environment"], LayerSettings())
        assert row["backend"] and row["gemlite_1bit_seconds"] is row["gemlite_4bit_error"] is None


def test_bench_kernels_prints_a_table_with_the_paper_preset(small_machine, capsys):
    assert main([*QUICK, "--shapes", "64x256", "--tokens", "2", "--preset", "paper"]) == 0
    head, row, last = capsys.readouterr().out.strip().splitlines()
    assert "roofline" in head and "speedup" in head
    bits = stored_bits_per_weight(64, 256, SABConfig.paper().layer_settings)
    assert row.split()[:4] == ["64x256", "64x256", "2", f"{bits:.3f}"]
    assert "GB/s" in last


def test_compare_kernels_gives_rows_as_they_come(small_machine):
    seen = []
    shape = LinearShape("small", 32, 128)
    report = compare_kernels([shape], [1, 3], Conditions(LayerSettings(), CPU, repeats=2), on_row=seen.append)
    assert tuple(seen) == report.rows and [row.m for row in seen] == [1, 3]


def test_compare_kernels_rotates_until_the_cache_is_exceeded(small_machine):
    shape = LinearShape("wide", 512, 512)  # about 40 kB packed, against four caches of 64 KiB
    row = compare_kernels([shape], [1], Conditions(LayerSettings(), CPU, repeats=50)).rows[0]
    assert 4 * (1 << 16) <= row.rotated_bytes < 4 * (1 << 16) + 60_000
    assert row.dense_rotated_bytes == 512 * 512 * 2  # already more than four caches
    few = compare_kernels([shape], [1], Conditions(LayerSettings(), CPU, repeats=2)).rows[0]
    assert few.rotated_bytes < 4 * (1 << 16)  # a copy per sample at most, and the row says so


def test_compare_kernels_reports_the_backend_that_was_asked_for(small_machine):
    conditions = Conditions(LayerSettings(), CPU, backend="reference", repeats=1)
    report = compare_kernels([LinearShape("small", 32, 128)], [1], conditions)
    assert report.rows[0].backend == "reference"


def wrong(name):
    right = SABLinear.forward

    def forward(self, inputs):
        output = right(self, inputs)
        if name == "scaled":
            return output * 1.05
        if name == "one token":
            return torch.cat([output[:-1], -output[-1:]])
        return torch.cat([output[..., :-1], torch.full_like(output[..., -1:], torch.nan)], -1)

    return forward


@pytest.mark.parametrize("name", ["scaled", "one token", "nan"])
def test_bench_kernels_refuses_to_time_a_wrong_kernel(small_machine, monkeypatch, capsys, name):
    monkeypatch.setattr(SABLinear, "forward", wrong(name))
    assert main([*QUICK, "--shapes", "64x256", "--tokens", "3"]) == 1
    assert "64x256, 3 tokens: the result is off by" in capsys.readouterr().err


def test_linear_error_is_of_the_worst_token():
    weight, inputs = torch.randn(16, 32), torch.randn(4, 32)
    assert linear_error(lambda x: x @ weight.T, inputs, weight) < 1e-6
    expected = inputs @ weight.T
    off = expected.clone()
    off[2] *= 1.25
    assert relative_error(off, expected) == pytest.approx(0.25, rel=1e-4)


def test_check_error_lets_no_nan_pass():
    check_error(TOLERANCE[torch.float32], torch.float32, "it")
    for bad in (2 * TOLERANCE[torch.float32], float("nan"), float("inf")):
        with pytest.raises(WrongResultError, match="it is off by"):
            check_error(bad, torch.float32, "it")


def test_model_shapes_cover_the_parameters_of_a_block():
    q, k, gate, down = model_shapes("qwen2.5-vl-7b")
    assert (q.out_features, q.in_features) == (3584, 3584)
    assert (k.out_features, k.in_features) == (512, 3584)
    assert (gate.out_features, gate.in_features) == (18944, 3584) == (down.in_features, down.out_features)
    sizes = {s.name.split()[1]: (s.out_features, s.in_features) for s in model_shapes("qwen2.5-vl-72b")}
    assert sizes == {"q/o": (8192, 8192), "k/v": (1024, 8192), "gate/up": (29568, 8192), "down": (8192, 29568)}


def test_parse_shapes_keeps_the_order():
    assert [s.name for s in parse_shapes(["8x16", "qwen2.5-vl-7b", "16x8"])] == [
        "8x16",
        *(f"qwen2.5-vl-7b {name}" for name in ("q/o", "k/v", "gate/up", "down")),
        "16x8",
    ]


@pytest.mark.parametrize("word", ["qwen3", "12", "12x", "x12", "1.5x2", "-1x4", "0x4", "4x0"])
def test_parse_shapes_names_what_is_none(word):
    with pytest.raises(ConfigError, match=word.replace(".", r"\.")):
        parse_shapes(["8x8", word])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "llama"], "'llama'"),
        (["--tokens", "0"], "--tokens 0"),
        (["--repeats", "0"], "--repeats 0"),
        (["--dtype", "int8"], "'int8'"),
        (["--backend", "abacus"], "'abacus'"),
        (["--device", "nowhere"], "'nowhere'"),
        (["--device", "meta"], "'meta'"),
        (["--device", "cuda:99"], "'cuda:99'"),
    ],
)
def test_bench_kernels_names_bad_values(small_machine, capsys, arguments, message):
    assert main([*QUICK, "--shapes", "32x64", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_gemlite_missing_is_named(monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gemlite" else real(name))
    assert main([*QUICK, "--shapes", "32x128", "--gemlite"]) == 1
    assert "pip install gemlite" in capsys.readouterr().err


def test_gemlite_wants_a_cuda_device(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "there" if name == "gemlite" else real(name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments, settings = ([LinearShape("small", 32, 128)], [1]), LayerSettings()
    with pytest.raises(MissingDependencyError, match="torch sees none"):
        compare_kernels(*arguments, Conditions(settings, CPU), others=["gemlite"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="not 'cpu'"):
        compare_kernels(*arguments, Conditions(settings, CPU), others=["gemlite"])
    with pytest.raises(ConfigError, match="float32"):
        compare_kernels(*arguments, Conditions(settings, torch.device("cuda"), torch.float32), others=["gemlite"])


class GemLiteStandIn:
    """gemlite's interface, computing (codes − zeros) · scales by groups."""

    def __init__(self, W_nbits, group_size, in_features, out_features, input_dtype, output_dtype):
        self.bits, self.group_size, self.shape = W_nbits, group_size, (out_features, in_features)

    def pack(self, codes, scales, zeros, bias):
        assert codes.dtype == torch.uint8 and codes.shape == self.shape and int(codes.max()) == 2**self.bits - 1
        grouped = codes.float().unflatten(1, (-1, self.group_size))
        self.weight = ((grouped - zeros.float()[..., None]) * scales.float()[..., None]).flatten(1)

    def __call__(self, inputs):
        return (inputs.float() @ self.weight.T).to(inputs.dtype)


def test_bench_kernels_fills_the_columns_of_gemlite(small_machine, monkeypatch, capsys):
    stub = types.ModuleType("gemlite")
    stub.GemLiteLinear, stub.DType, stub.set_autotune = GemLiteStandIn, types.SimpleNamespace(BF16=1, FP16=2), len
    monkeypatch.setitem(sys.modules, "gemlite", stub)
    monkeypatch.setitem(CHECKS, "gemlite", lambda device, dtype: None)
    command = [*QUICK, "--shapes", "64x256", "64x200", "--tokens", "2", "--gemlite"]
    assert main([*command, "--json"]) == 0
    taken, refused = json.loads(capsys.readouterr().out)["rows"]
    for bits in (1, 2, 4):
        assert taken[f"gemlite_{bits}bit_seconds"] > 0
        assert 0 < taken[f"gemlite_{bits}bit_error"] < TOLERANCE[torch.bfloat16]
        assert refused[f"gemlite_{bits}bit_seconds"] is None  # 200 columns are no whole groups
    assert main(command) == 0
    head, first, second, _ = capsys.readouterr().out.strip().splitlines()
    assert head.split()[-2:] == ["gemlite", "4b"]
    assert float(first.split()[-1]) > 0 and second.split()[-3:] == ["-", "-", "-"]


@pytest.mark.gpu
def test_bench_kernels_on_cuda(capsys):
    command = ["bench", "kernels", "--device", "cuda", "--shapes", "1024x2048", "--tokens", "1", "64", "--repeats", "3"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert TOKENS["cuda"][-1] == 4096
    for row in found["rows"]:
        check_row(row, found["environment"], LayerSettings())
        assert row["rotated_bytes"] >= 300_000_000 and row["dense_rotated_bytes"] >= 300_000_000


@pytest.mark.gpu
def test_bench_kernels_times_gemlite(capsys):
    pytest.importorskip("gemlite")
    command = ["bench", "kernels", "--device", "cuda", "--shapes", "1024x2048", "--tokens", "1", "--repeats", "3"]
    assert main([*command, "--gemlite", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    for bits in (1, 2, 4):
        assert row[f"gemlite_{bits}bit_seconds"] > 0
        assert row[f"gemlite_{bits}bit_error"] < 2e-2


def test_int4_rows_hold_the_time_of_torch_s_kernel(capsys):
    command = ["bench", "kernels", "--device", "cpu", "--shapes", "64x256", "64x96", "--tokens", "3", "--repeats", "2"]
    assert main([*command, "--int4", "--json"]) == 0
    taken, refused = json.loads(capsys.readouterr().out)["rows"]
    assert taken["int4_seconds"] > 0
    assert 0 <= taken["int4_error"] < 2e-2  # activations and output in bfloat16
    assert refused["int4_seconds"] is None  # the kernel takes widths of whole groups
    assert main([*command, "--int4"]) == 0
    assert "int4" in capsys.readouterr().out.splitlines()[0]


def test_coded_rows_hold_the_time_of_the_same_layer_with_a_code(capsys):
    command = [*QUICK, "--shapes", "48x200", "--tokens", "1", "3", "--dtype", "float32"]
    assert main([*command, "--code", "trellis16", "--json"]) == 0
    for row in json.loads(capsys.readouterr().out)["rows"]:
        assert row["coded_seconds"] > 0 and 0 <= row["coded_error"] <= TOLERANCE[torch.float32]
    assert main([*command, "--code", "trellis16"]) == 0
    assert "coded us" in capsys.readouterr().out.splitlines()[0]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["coded_seconds"] is None


def test_int4_is_refused_in_another_dtype(capsys):
    command = ["bench", "kernels", "--device", "cpu", "--shapes", "64x256", "--int4", "--dtype", "float32"]
    assert main(command) == 1
    assert "bfloat16" in capsys.readouterr().err


def test_busy_rows_hold_times_beside_busy_processes(small_machine, capsys, monkeypatch):
    from optimum_sab.bench import busy

    started, real = [], busy.busy_processes
    monkeypatch.setattr(busy, "busy_processes", lambda count: started.append(count) or real(count))
    command = [*QUICK, "--shapes", "64x256", "--tokens", "1", "2", "--busy", "2"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["busy"] == 2 and started == [2] * 4  # packed and dense, of two numbers of tokens
    for row in found["rows"]:
        for start in ("", "dense_"):
            assert min(row[f"{start}{name}_seconds"] for name in ("quiet", "busy", "busy_mean")) > 0
    assert main(command) == 0
    head, row, _, which, _ = capsys.readouterr().out.strip().splitlines()
    assert head.split()[-5:] == ["x", "x", "mean", "dense", "x"] and float(row.split()[-4]) > 0
    assert "beside 2 processes" in which


def test_busy_processes_compute_and_end():
    from optimum_sab.bench.busy import busy_processes

    def children():
        return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())

    if not Path(f"/proc/self/task/{os.getpid()}/children").exists():
        pytest.skip("this system does not tell children")
    before = children()
    with busy_processes(2):
        assert len(children() - before) == 2
    assert children() == before


def test_busy_processes_that_do_not_begin_are_an_error(monkeypatch):
    from optimum_sab.bench import busy

    monkeypatch.setattr(busy, "_ENDLESS", "print('something else')")
    with pytest.raises(busy.BusyError, match="ended instead of computing"), busy.busy_processes(1):
        pass


def test_rows_without_busy_processes_have_no_such_times(small_machine, capsys):
    assert main([*QUICK, "--shapes", "64x256", "--tokens", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (row,) = found["rows"]
    assert found["busy"] == 0 and row["quiet_seconds"] is row["busy_seconds"] is row["dense_busy_mean_seconds"] is None


@pytest.mark.parametrize(("device", "busy"), [("cpu", -1), ("cuda", 2)])
def test_busy_processes_that_cannot_be_are_refused(device, busy):
    conditions = Conditions(LayerSettings(), torch.device(device), busy=busy)
    with pytest.raises(ConfigError, match=f"--busy {busy}"):
        compare_kernels([LinearShape("small", 32, 128)], [1], conditions)
