"""How many parameters a packed model has, and how many bytes."""

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    modeling_utils,
)

from optimum_sab import SABLinear
from optimum_sab.errors import ConfigError
from optimum_sab.hf import counting, quantizer
from optimum_sab.hf.registration import register

FIVE = int(transformers.__version__.split(".")[0]) >= 5


def linears(model, kind):
    return {name for name, module in model.named_modules() if isinstance(module, kind)}


def test_all_linears_but_the_head_are_packed(pair, model):
    dense = AutoModelForCausalLM.from_pretrained(pair.dense)
    assert linears(model, SABLinear) == linears(dense, nn.Linear) - {"lm_head"}
    assert type(model.lm_head) is nn.Linear


def test_other_heads_keep_their_class(pair):
    base = AutoModel.from_pretrained(pair.packed)
    assert len(linears(base, SABLinear)) == 14
    classifier = AutoModelForSequenceClassification.from_pretrained(pair.packed, num_labels=3)
    assert len(linears(classifier, SABLinear)) == 14
    assert type(classifier.score) is nn.Linear
    assert bool(torch.isfinite(classifier.score.weight).all())


@pytest.mark.parametrize("exclude_embeddings", [False, True])
def test_parameters_are_counted_as_in_the_dense_model(pair, model, exclude_embeddings):
    dense = AutoModelForCausalLM.from_pretrained(pair.dense)
    expected = dense.num_parameters(exclude_embeddings=exclude_embeddings)
    assert model.num_parameters(exclude_embeddings=exclude_embeddings) == expected
    assert model.model.num_parameters(exclude_embeddings=exclude_embeddings) == dense.model.num_parameters(
        exclude_embeddings=exclude_embeddings
    )
    assert expected < dense.num_parameters() or not exclude_embeddings
    model.dequantize()
    assert model.num_parameters(exclude_embeddings=exclude_embeddings) == expected


def test_only_what_is_trained_counts_as_trainable(model):
    kept = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert model.num_parameters(only_trainable=True) == kept
    model.requires_grad_(False)
    assert model.num_parameters(only_trainable=True) == 0


def test_other_models_are_counted_as_before(pair):
    dense = AutoModelForCausalLM.from_pretrained(pair.dense)
    assert dense.num_parameters() == sum(p.numel() for p in dense.parameters())
    around = PreTrainedModel.num_parameters.without_packed
    register()
    counting.install()
    assert PreTrainedModel.num_parameters.without_packed is around  # once, however often


def test_footprint_is_the_bytes_of_the_tensors_in_the_file(pair, model):
    stored = sum(t.numel() * t.element_size() for t in load_file(pair.packed / "model.safetensors").values())
    assert model.get_memory_footprint(return_buffers=False) == stored
    dense = AutoModelForCausalLM.from_pretrained(pair.dense, dtype=torch.float32)
    bits = 8 * sum(t.nbytes for m in model.modules() if isinstance(m, SABLinear) for t in m.tensors)
    weights = sum(m.weight.numel() for n, m in dense.named_modules() if isinstance(m, nn.Linear) and n != "lm_head")
    assert bits / weights < 2.5


def test_a_device_map_is_made_from_the_packed_bytes(pair, logits, model, tmp_path):
    pytest.importorskip("accelerate")
    layer = sum(p.numel() * p.element_size() for p in model.model.layers[0].parameters())
    rest = model.get_memory_footprint() - 2 * layer
    settings = {"dtype": torch.float32, "device_map": "auto", "offload_folder": tmp_path}
    fits = AutoModelForCausalLM.from_pretrained(pair.packed, max_memory={"cpu": rest + 3 * layer}, **settings)
    assert not any(p.is_meta for p in fits.parameters())  # one dense layer would be too much already
    tight = {**settings, "max_memory": {"cpu": rest}}
    if not FIVE:
        with pytest.raises(ConfigError, match="disk"):
            AutoModelForCausalLM.from_pretrained(pair.packed, **tight)
        return
    offloaded = AutoModelForCausalLM.from_pretrained(pair.packed, **tight)
    assert "disk" in offloaded.hf_device_map.values()
    assert torch.equal(logits(offloaded), logits(model))
    assert offloaded.num_parameters() == model.num_parameters()


@pytest.mark.skipif(not FIVE, reason="Transformers 4.57 has accelerate make the map")
def test_a_model_larger_than_a_device_is_spread_over_several(pair, logits, model, monkeypatch, tmp_path):
    """Two accelerators are simulated: they are there when the map is made. When it is followed, what is on the second
    comes and goes, by the hooks that would move inputs there."""
    pytest.importorskip("accelerate")
    layer = sum(p.numel() * p.element_size() for p in model.model.layers[0].parameters())
    embedding = model.model.embed_tokens.weight.nbytes
    room = {0: 2 * embedding + 3 * layer // 2, 1: 3 * embedding}  # accelerate keeps room for the largest module
    maps, make = [], modeling_utils._get_device_map

    def simulated(*arguments):
        maps.append(make(*arguments))
        return {name: {0: "cpu", 1: "disk"}[place] for name, place in maps[-1].items()}

    monkeypatch.setattr(modeling_utils, "_get_device_map", simulated)
    monkeypatch.setattr(quantizer, "check_device_map", lambda device_map: None)
    spread = AutoModelForCausalLM.from_pretrained(
        pair.packed, dtype=torch.float32, device_map="auto", max_memory=room, offload_folder=tmp_path
    )
    [places] = maps
    assert [places[name] for name in ("model.embed_tokens", "model.layers.0", "model.layers.1")] == [0, 0, 1]
    taken = dict.fromkeys(room, 0)
    for name, place in places.items():
        taken[place] += sum(p.numel() * p.element_size() for p in model.get_submodule(name).parameters())
    assert all(taken[place] <= room[place] for place in room)
    assert torch.equal(logits(spread), logits(model))


@pytest.mark.skipif(not FIVE, reason="accelerate computes the sizes for Transformers 4.57, from the tensors' dtypes")
def test_module_sizes_are_those_of_the_packed_tensors(model):
    from transformers.integrations.accelerate import compute_module_sizes

    sizes, _ = compute_module_sizes(model, model.hf_quantizer)
    for name, layer in model.named_modules():
        if isinstance(layer, SABLinear):
            assert sizes[name] == sum(p.numel() * p.element_size() for p in layer.parameters())


def test_what_is_reserved_on_a_gpu_is_what_the_model_takes(model, monkeypatch):
    reserved = []
    for name, value in (
        ("mem_get_info", (1 << 40, 1 << 40)),
        ("memory_reserved", 0),
        ("memory_allocated", 0),
        ("current_device", 0),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch, "empty", lambda count, dtype, **_: reserved.append(count * dtype.itemsize))
    places = {name: "cuda:0" for name, _ in model.named_parameters()}
    modeling_utils.caching_allocator_warmup(model, places, model.hf_quantizer)
    taken = model.get_memory_footprint(return_buffers=False)
    if not FIVE:  # takes every head for tied
        taken -= model.lm_head.weight.nbytes
    assert reserved == [taken // 2 * 2]
