"""Random checkpoints: shards, values, and that the quantizer takes them."""

import json

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors import safe_open

from optimum_sab import AutoModelForVision2Seq, SABConfig
from optimum_sab.bench import random_checkpoint
from optimum_sab.bench.random_checkpoint import RandomCheckpoint
from optimum_sab.cli.main import main

needs_5 = pytest.mark.skipif(Version(transformers.__version__) < Version("5"), reason="reads no streamed weights")


def tensors(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # no mapping
    return found


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("random") / "tiny"
    assert main(["bench", "checkpoint", str(folder), "--size", "tiny", "--quiet"]) == 0
    return folder


def test_weights_are_bfloat16_and_plausible(tiny):
    found = tensors(tiny)
    assert {each.dtype for each in found.values()} == {torch.bfloat16}
    weight = found["model.language_model.layers.1.mlp.up_proj.weight"].float()
    assert weight.std() == pytest.approx(0.02, rel=0.02) and abs(float(weight.mean())) < 2e-4
    assert bool((found["model.language_model.norm.weight"] == 1).all())
    assert not found["model.language_model.layers.0.self_attn.q_proj.bias"].any()


def test_shards_are_bounded_and_the_index_names_them(tmp_path):
    RandomCheckpoint("tiny", shard_bytes=10**6).write(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and set(index["weight_map"].values()) == {each.name for each in files}
    assert set(index["weight_map"]) == set(tensors(tmp_path))
    for file in files:
        with safe_open(file, framework="pt") as opened:
            assert sum(opened.get_tensor(name).nbytes for name in opened.keys()) <= 10**6  # noqa: SIM118


def test_a_tensor_does_not_depend_on_the_others_but_on_the_seed(tiny, tmp_path):
    for name, seed in (("cut", 0), ("other", 1)):
        (tmp_path / name).mkdir()
        RandomCheckpoint("tiny", blocks=1, seed=seed).write(tmp_path / name)
    whole, cut, other = tensors(tiny), tensors(tmp_path / "cut"), tensors(tmp_path / "other")
    assert set(cut) < set(whole) and all(torch.equal(whole[name], value) for name, value in cut.items())
    key = "lm_head.weight"
    assert not torch.equal(cut[key], other[key])


@needs_5
def test_the_quantizer_takes_it_streamed_or_not(tiny):
    asked = {"calibration_samples": 4, "iterations": 1, "sweeps": 0, "allocation": "uniform", "progress": "none"}
    models = [
        AutoModelForVision2Seq.from_pretrained(tiny, quantization_config=SABConfig(**asked, stream_weights=stream))
        for stream in (False, True)
    ]
    mine, streamed = (model.state_dict() for model in models)
    assert set(mine) == set(streamed) and all(torch.equal(value, streamed[name]) for name, value in mine.items())


@needs_5
def test_a_cut_mixture_has_the_shapes_of_the_published_one(monkeypatch):
    text = RandomCheckpoint("30b-a3b", blocks=2).model().model.language_model
    assert len(text.layers) == 2 and text.layers[0].mlp.experts.gate_up_proj.numel() == 128 * 2048 * 1536
    whole = RandomCheckpoint("30b-a3b").model()
    assert sum(each.numel() for each in whole.model.language_model.parameters()) == pytest.approx(30.2e9, rel=0.02)


def test_13b_takes_more_than_28_gb():
    model = RandomCheckpoint("13b").model()
    assert 28e9 < 2 * sum(each.numel() for each in model.parameters()) < 31e9


@needs_5
@pytest.mark.full
def test_a_mixture_is_taken(tmp_path, monkeypatch):
    small = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "hidden_size": 256,
        "head_dim": 32,
        "moe_intermediate_size": 128,
    }
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 1024}
    section = {"rope_scaling": {"rope_type": "default", "mrope_section": [6, 5, 5], "mrope_interleaved": True}}
    text = {**random_checkpoint._TEXT_30B_A3B, **small, **heads, **section}
    eyes = {"depth": 4, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "deepstack_visual_indexes": [1]}
    vision = {**random_checkpoint._VISION_30B_A3B, **eyes, "out_hidden_size": 256, "num_position_embeddings": 64}
    monkeypatch.setattr(random_checkpoint, "_TEXT_30B_A3B", text)
    monkeypatch.setattr(random_checkpoint, "_VISION_30B_A3B", vision)
    RandomCheckpoint("30b-a3b", blocks=2).write(tmp_path)
    config = SABConfig(calibration_samples=4, iterations=1, sweeps=0, allocation="uniform", stream_weights=True)
    model = AutoModelForVision2Seq.from_pretrained(tmp_path, quantization_config=config)
    assert len(model.hf_quantizer.report.blocks) == 2


@needs_5
def test_headers_alone_take_no_room_and_can_be_planned(tiny, tmp_path, capsys):
    folder = tmp_path / "headers"
    assert main(["bench", "checkpoint", str(folder), "--size", "tiny", "--headers"]) == 0
    assert "headers for the weights of tiny with 2 blocks" in capsys.readouterr().out
    files = list(folder.glob("*.safetensors"))
    assert sum(each.stat().st_blocks * 512 for each in files) < 10**5 < sum(each.stat().st_size for each in files)
    whole, holes = tensors(tiny), tensors(folder)
    assert {name: (each.shape, each.dtype) for name, each in whole.items()} == {
        name: (each.shape, each.dtype) for name, each in holes.items()
    }
    plans = []
    for each in (tiny, folder):
        assert main(["plan", str(each), "--calibration-samples", "4", "--json"]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    assert plans[0]["disk"] == plans[1]["disk"] and plans[0]["binarized"] == plans[1]["binarized"]


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        (["--size", "huge"], "'huge' must be one of 7b, 13b"),
        (["--size", "tiny", "--blocks", "0"], "--blocks 0 must be at least 1"),
        ([], "--size"),
    ],
)
def test_wrong_calls_are_refused(asked, named, tmp_path, capsys):
    assert main(["bench", "checkpoint", str(tmp_path / "out"), *asked]) != 0
    assert named in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
