"""Tensor parallelism: two processes over gloo, each with its share of packed layers."""

import json
import re

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from optimum_sab import SABConfig
from optimum_sab.bench.coverage.configuration import random_model
from optimum_sab.bench.coverage.exceptions import exceptions_of
from optimum_sab.bench.coverage.families import find_families
from optimum_sab.bench.coverage.samples import build_samples
from tests.hf.contract.packing import pack
from tests.hf.contract.together import found_by_two

NEWEST = Version(transformers.__version__) >= Version("5.24")
pytestmark = pytest.mark.skipif(not NEWEST, reason="the interface is that of Transformers 5.24")

LAYERS = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512}
LAYERS |= {"num_hidden_layers": 1, "eos_token_id": None, "pad_token_id": 0, "bos_token_id": 1}
EXPERTS = {"head_dim": 32, "moe_intermediate_size": 192, "num_experts": 4, "num_experts_per_tok": 2}
KINDS = ("llama", "tp_plan", "pictures", "fused", "experts", "coded", "coded experts")
MOST = {"coded": 0.75, "coded experts": 0.75}  # the blocks in which a share begins and ends are there whole
TEXT = {"input_ids": torch.arange(20, 50).view(2, 15)}


def save(folder, model, config, row=TEXT):
    pack(model, config).save_pretrained(folder)
    torch.save((row, type(model).__name__), folder / "sample.pt")


def llama(**changes):
    settings = {**LAYERS, "intermediate_size": 192, "attention_bias": True, "mlp_bias": True, **changes}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def with_pictures():
    [family] = find_families(["qwen2_vl"])
    exceptions = exceptions_of("qwen2_vl")
    model = random_model(family, exceptions)
    return model, build_samples(model, family, exceptions).rows[0]


def mixture(kind="qwen3_moe", **changes):
    config = transformers.AutoConfig.for_model(kind, **{**LAYERS, "intermediate_size": 192, **changes})
    return transformers.AutoModelForCausalLM.from_config(config)


def damage(folder):
    """Turn one bit of the last packed sign."""
    file = folder / "model.safetensors"
    with open(file, "r+b") as opened:
        header = int.from_bytes(opened.read(8), "little")
        entry = json.loads(opened.read(header))["model.layers.0.mlp.down_proj.weight"]
        opened.seek(8 + header + entry["data_offsets"][1] - 1)
        byte = opened.read(1)[0]
        opened.seek(-1, 1)
        opened.write(bytes([byte ^ 1]))


@pytest.fixture(scope="module")
def found(warm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharing")
    torch.manual_seed(0)
    quiet = {"progress": "none", "block_size": 64}
    for name in ("llama", "damaged"):
        save(folder / name, llama(), SABConfig(**quiet))
    damage(folder / "damaged")
    model, row = with_pictures()
    save(folder / "pictures", model, SABConfig.two_bit(**quiet), row)
    save(folder / "fused", Phi3ForCausalLM(Phi3Config(**LAYERS, intermediate_size=256)), SABConfig(**quiet))
    save(folder / "experts", mixture(**EXPERTS), SABConfig(**{**quiet, "block_size": 128}))
    wide = {"hidden_size": 256, "intermediate_size": 768}
    coded = {**quiet, "block_size": 128}
    save(folder / "coded", llama(**wide), SABConfig(**coded, code="trellis16"))
    two = {"code": "trellis16x2", "allocation": "uniform"}
    experts = mixture(**{**EXPERTS, "moe_intermediate_size": 384})
    save(folder / "coded experts", experts, SABConfig.two_bit(**coded, **two))
    save(folder / "one head", llama(num_key_value_heads=1), SABConfig(**quiet))
    save(folder / "narrow", llama(intermediate_size=160), SABConfig(**quiet))
    biased = mixture("gpt_oss", num_local_experts=4, head_dim=32)
    save(folder / "experts with biases", biased, SABConfig(**quiet))
    save(folder / "none of the packed", mixture("gpt_oss", num_local_experts=4, head_dim=32), SABConfig(**quiet))
    return found_by_two(warm / "python", "tests.hf.contract.two_shares", [folder], folder, 120)


@pytest.mark.parametrize("kind", KINDS)
def test_shares_compute_what_the_whole_model_does(found, kind):
    for results in found:
        assert results[kind]["off"] <= 2e-6 * results[kind]["largest"]  # float32, summed in another order
        assert results[kind]["same tokens"]
        assert results[kind]["parameters"][0] == results[kind]["parameters"][1]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_go_through_shares(found, kind):
    for results in found:
        assert results[kind]["loss"] <= 1e-6
        assert results[kind]["grad"] <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_process_reads_and_holds_about_half(found, kind):
    for results in found:
        assert results[kind]["read"] == [0.5]
        assert results[kind]["held"] <= MOST.get(kind, 0.6)


def test_shares_of_siblings_are_grouped(found):
    for results in found:
        assert results["llama"]["groups"] == [2, 3]  # gate and up; q, k and v
        assert results["experts"]["groups"] == [3]


def test_blocks_may_be_shared(found):
    assert [results["llama"]["pieces"] for results in found] == [[1, 2], [1, 2]]  # 192 inputs in blocks of 64
    assert [results["experts"]["pieces"] for results in found] == [[1], [1, 2]]  # 128 and 64, of which a half is 96


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("one head", r"k_proj: its 1 attention heads cannot be shared by 2 processes"),
        ("narrow", r"down_proj: its 160 input columns cannot be shared in multiples of 32 by 2 processes"),
        ("experts with biases", r"mlp\.experts: these experts cannot be shared by 2 processes"),
        ("fsdp", r"distributed_config splits the model .* with fsdp_size=2"),
        ("dequantize", r"dequantize=True wants dense layers of whole ones"),
        ("no rules", r"LlamaForCausalLM has no plan for tensor parallelism"),
        ("rule for a tensor", r"'model\.layers\.\*\.mlp\.down_proj\.weight', which is a tensor of a packed layer"),
        ("another style", r"mlp\.down_proj has the style 'all_reduce'"),
        ("a style around", r"layers\.0\.mlp has the style 'all_reduce'"),
        ("none of the packed", r"GptOssForCausalLM shares none of its packed layers"),
    ],
)
def test_what_cannot_be_shared_is_refused_by_name_before_weights_are_read(found, case, said):
    for results in found:
        assert re.match(f"ConfigError: .*({said})", results["refused"][case]), results["refused"][case]


def test_damage_is_found_by_every_process(found):
    for results in found:
        assert results["damaged"].startswith("FormatError: model.layers.0.mlp.down_proj.weight: not what was saved")


@pytest.mark.parametrize("what", ["saved", "saved in parts", "dequantized", "adapted"])
def test_a_share_is_refused_where_a_whole_layer_is_needed(found, what):
    for results in found:
        expected = f"is a share of a packed layer.* cannot be {what.split()[0]}"
        assert re.match(f"ConfigError: .*{expected}", results["afterwards"][what]), results["afterwards"][what]
