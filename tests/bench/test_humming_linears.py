"""Humming's linears, by a stand-in with the signatures and checks of humming-kernels 0.1.19; it needs CUDA itself."""

import importlib.util
import json
import sys
import types

import pytest
import torch

from optimum_sab.bench.conditions import Conditions
from optimum_sab.bench.humming_linears import humming_bytes, humming_linear, humming_weight, supports
from optimum_sab.bench.other_linears import CHECKS, check_others
from optimum_sab.bench.shapes import LinearShape, model_shapes
from optimum_sab.bench.verification import TOLERANCE, linear_error
from optimum_sab.cli.main import main
from optimum_sab.core.settings import LayerSettings
from optimum_sab.errors import ConfigError, MissingDependencyError

CPU = torch.device("cpu")
QUICK = ["bench", "kernels", "--device", "cpu", "--repeats", "2"]


def pack_weight(inputs, num_bits, outputs=None):
    """Code i of 32 at bit i · num_bits of its num_bits words, as `include/humming/kernel/pack_weight.cuh` does."""
    assert inputs.dtype == torch.int32 and inputs.is_contiguous() and inputs.size(-1) % 32 == 0
    words = inputs.long().unflatten(1, (-1, 32 // num_bits))
    shifts = num_bits * torch.arange(32 // num_bits)
    return ((words & (2**num_bits - 1)) << shifts).sum(-1).to(torch.int32)


class HummingLayer(torch.nn.Module):
    """Its interface and what it refuses, computing with the codes that it unpacks."""

    def __init__(
        self,
        shape_n,
        shape_k,
        weight_config,
        input_config=None,
        pad_n_to_multiple=1,
        pad_k_to_multiple=1,
        num_experts=None,
        has_bias=False,
        torch_dtype=None,
    ):
        super().__init__()
        assert torch_dtype in (torch.float16, torch.bfloat16)
        assert weight_config.keys() == {"dtype", "group_size"}  # aliases of b_dtype and weight_scale_group_size
        self.bits, self.group = int(weight_config["dtype"].removeprefix("int")), weight_config["group_size"]
        weight_config["quant_method"] = "humming"  # the real one writes into what it is given, too
        self.size, self.humming_config = (shape_n, shape_k), None
        words, groups = shape_k * self.bits // 32, shape_k // self.group
        self.weight = torch.nn.Parameter(torch.empty(shape_n, words, dtype=torch.int32), requires_grad=False)
        self.weight_scale = torch.nn.Parameter(torch.empty(shape_n, groups, dtype=torch_dtype), requires_grad=False)

    def load_from_tensors(self, tensors, prefix=""):
        assert {n: (t.shape, t.dtype) for n, t in tensors.items()} == {
            n: (t.shape, t.dtype) for n, t in self.named_parameters()
        }
        self.load_state_dict(tensors, strict=False)

    def transform(self):
        assert self.size[0] % 64 == 0 and self.size[1] % 32 == 0
        shifts = self.bits * torch.arange(32 // self.bits)
        codes = ((self.weight.long()[..., None] >> shifts) & (2**self.bits - 1)).flatten(1)
        centred = (codes - 2 ** (self.bits - 1)).float().unflatten(1, (-1, self.group))
        self.dense = (centred * self.weight_scale.float()[..., None]).flatten(1)
        self.humming_config = types.SimpleNamespace(shape_n=self.size[0], shape_k=self.size[1])

    def forward(
        self,
        inputs,
        outputs=None,
        input_scale=None,
        input_scale_2=None,
        sorted_ids=None,
        expert_ids=None,
        num_tokens_padded=None,
        expert_layout=None,
        top_k=1,
        valid_shape_m=0,
        compute_config=None,
        tuning_config=None,
        hadamard_block_size=None,
        use_pdl=None,
    ):
        assert self.humming_config is not None, "call transform() before forward()"
        assert json.loads(json.dumps(tuning_config)) == {"for": len(inputs)}  # it travels as JSON
        return (inputs.float() @ self.dense.T).to(inputs.dtype)


def get_heuristics_config(
    layer_config,
    shape_m=None,
    use_f16_accum=False,
    use_batch_invariant=False,
    use_m_major_input_scale=False,
    gemm_type="dense",
    device=None,
):
    assert layer_config.shape_n % 128 == 0 and isinstance(shape_m, int)  # what its kernels for Hopper take
    return {"for": shape_m}


@pytest.fixture
def humming(monkeypatch):
    parts = {"layer": {"HummingLayer": HummingLayer}, "ops": {"pack_weight": pack_weight}}
    parts["tune"] = {"get_heuristics_config": get_heuristics_config}
    monkeypatch.setitem(sys.modules, "humming", types.ModuleType("humming"))
    for name, content in parts.items():
        module = types.ModuleType(f"humming.{name}")
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(CHECKS, "humming", lambda device, dtype: None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "values"), [(1, {-1, 0}), (2, {-2, -1, 0, 1})])
def test_humming_linear_computes_its_weight(humming, bits, values, dtype):
    shape = LinearShape("small", 128, 256)
    linear = humming_linear(bits, shape, dtype, CPU, seed=3)
    weight = humming_weight(bits, shape, dtype, CPU, seed=3)
    for tokens in (1, 5, 1):
        inputs = torch.randn(tokens, 256, dtype=dtype, generator=torch.Generator().manual_seed(tokens))
        assert linear_error(linear, inputs, weight) < TOLERANCE[dtype]
    groups = weight.unflatten(1, (-1, 128))
    steps = groups.abs().amax(-1, keepdim=True) / max(abs(v) for v in values)  # every group holds the largest code
    assert {round(v) for v in (groups / steps).flatten().tolist()} == values
    assert not torch.equal(weight, humming_weight(bits, shape, dtype, CPU, seed=4))


def test_humming_supports_the_shapes_that_are_measured():
    assert all(supports(s) for model in ("qwen2.5-vl-7b", "qwen2.5-vl-72b") for s in model_shapes(model))
    assert not supports(LinearShape("short", 64, 256)) and not supports(LinearShape("narrow", 128, 200))


def test_humming_bytes_count_codes_and_scales():
    assert humming_bytes(1, LinearShape("small", 128, 256)) == 128 * 256 // 8 + 128 * 2 * 2
    assert humming_bytes(2, LinearShape("small", 128, 256)) == 128 * 256 // 4 + 128 * 2 * 2


def test_bench_kernels_fills_the_columns_of_humming(humming, small_machine, capsys):
    command = [*QUICK, "--shapes", "128x256", "64x256", "--tokens", "2", "--humming", "--int4"]
    assert main([*command, "--json"]) == 0
    taken, refused = json.loads(capsys.readouterr().out)["rows"]
    for bits in (1, 2):
        assert taken[f"humming_{bits}bit_seconds"] > 0
        assert 0 < taken[f"humming_{bits}bit_error"] < TOLERANCE[torch.bfloat16]
        assert refused[f"humming_{bits}bit_seconds"] is refused[f"humming_{bits}bit_error"] is None
    assert taken["gemlite_1bit_seconds"] is None and taken["int4_seconds"] > 0
    assert main(command) == 0
    head, first, second, _ = capsys.readouterr().out.strip().splitlines()
    assert head.split()[-5:] == ["humming", "1b", "humming", "2b", "int4"]
    assert float(first.split()[-2]) > 0 and second.split()[-3:-1] == ["-", "-"]


def test_humming_that_computes_something_else_is_reported_and_not_judged(humming, small_machine, monkeypatch, capsys):
    monkeypatch.setattr(HummingLayer, "forward", lambda self, inputs, tuning_config: inputs.new_ones(len(inputs), 128))
    assert main([*QUICK, "--shapes", "128x256", "--tokens", "2", "--humming", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["humming_1bit_error"] > 0.5 and row["humming_1bit_seconds"] > 0


def test_humming_missing_is_named(monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "humming" else real(name))
    assert main([*QUICK, "--shapes", "128x128", "--humming"]) == 1
    assert "pip install humming-kernels[cu13]" in capsys.readouterr().err


def test_humming_wants_a_cuda_device(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "there" if name == "humming" else real(name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MissingDependencyError, match="torch sees none"):
        check_others(["humming"], Conditions(LayerSettings(), CPU))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="not 'cpu'"):
        check_others(["humming"], Conditions(LayerSettings(), CPU))
    with pytest.raises(ConfigError, match="float32"):
        check_others(["humming"], Conditions(LayerSettings(), torch.device("cuda"), torch.float32))


@pytest.mark.gpu
def test_bench_kernels_times_humming(capsys):
    pytest.importorskip("humming")
    command = ["bench", "kernels", "--device", "cuda", "--shapes", "1024x2048", "--tokens", "1", "16", "--repeats", "3"]
    assert main([*command, "--humming", "--json"]) == 0
    for row in json.loads(capsys.readouterr().out)["rows"]:
        for bits in (1, 2):
            assert row[f"humming_{bits}bit_seconds"] > 0
            assert row[f"humming_{bits}bit_error"] < 2e-2
