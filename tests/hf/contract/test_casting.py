"""Devices and dtypes: what casts a packed model, what refuses to, and what may never reach the packed bits."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_sab import AutoModelForVision2Seq, SABLinear
from optimum_sab.errors import ConfigError

FIVE = int(transformers.__version__.split(".")[0]) >= 5
MARK = "_is_quantized" if FIVE else "_pre_quantization_dtype"


def packed_tensors(model):
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SABLinear)}
    return {f"{name}.{key}": tensor for name, layer in layers.items() for key, tensor in layer.packed.tensors.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
def test_the_dtype_of_loading_is_that_of_everything_but_the_packed_bits(pair, model, argument, dtype):
    loaded = AutoModelForCausalLM.from_pretrained(pair.packed, **{argument: dtype})
    assert loaded.dtype == torch.bfloat16
    assert {p.dtype for p in loaded.parameters() if p.is_floating_point()} == {torch.bfloat16}
    assert_same(packed_tensors(loaded), packed_tensors(model))


def test_dtype_auto_is_the_saved_one(pair, tmp_path):
    AutoModelForCausalLM.from_pretrained(pair.packed, dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.bfloat16()], ids=["to", "bfloat16"])
def test_a_cast_gives_what_loading_in_that_dtype_gives(pair, model, logits, cast):
    bits = packed_tensors(model)
    cast(model)
    assert model.dtype == torch.bfloat16
    assert_same(packed_tensors(model), bits)
    loaded = AutoModelForCausalLM.from_pretrained(pair.packed, dtype=torch.bfloat16)
    model.model.rotary_emb = loaded.model.rotary_emb  # its frequencies, which are never stored, were cast too
    assert torch.equal(logits(loaded), logits(model))


def test_half_and_float_are_refused_by_transformers(model):
    for method in (model.half, model.float):
        with pytest.raises(ValueError, match="not supported for quantized"):
            method()
    model.dequantize()
    model.half()
    assert model.dtype == torch.float16


@pytest.mark.parametrize(
    "cast", [lambda m: m.type(torch.float32), lambda m: m._apply(lambda t: t.float())], ids=["type", "apply"]
)
def test_packed_bits_cannot_become_numbers(model, cast):
    layer = model.model.layers[0].mlp.up_proj
    bits = packed_tensors(model)
    with pytest.raises(ConfigError, match=r"hold bits and cannot become torch\.float32"):
        cast(layer)
    assert_same(packed_tensors(model), bits)
    assert all(layer._parameters[name] is not None for name in layer.shape.names)


def test_moving_changes_nothing(model, logits):
    before = logits(model)
    assert model.to("cpu") is model
    assert model.cpu().device.type == "cpu"
    assert torch.equal(logits(model), before)


@pytest.mark.skipif(FIVE, reason="Transformers 5 dropped it: nothing there reads it, config.dtype says the same")
def test_the_dtype_before_is_in_the_config_under_4_57(pair, model):
    assert model.config._pre_quantization_dtype == torch.float32
    assert not hasattr(AutoModelForCausalLM.from_pretrained(pair.dense).config, "_pre_quantization_dtype")


def test_dtype_of_the_config_is_that_of_the_model(model):
    assert model.config.dtype == torch.float32


def test_dequantizing_leaves_no_trace(pair, model):
    model.dequantize()
    assert not hasattr(model, "hf_quantizer")
    assert not hasattr(model, "quantization_method")
    assert model.is_quantized is False
    for part in (model, model.model):
        for mark in ("quantization_config", "_pre_quantization_dtype", "_is_quantized"):
            assert not hasattr(part.config, mark), mark
    assert not packed_tensors(model)
    model.to(torch.bfloat16).float()
    dense = AutoModelForCausalLM.from_pretrained(pair.dense)
    assert model.state_dict().keys() == dense.state_dict().keys()


def test_parts_of_a_dequantized_model_have_no_trace_either(packed_vlm, tmp_path):
    packed_vlm().save_pretrained(tmp_path)
    model = AutoModelForVision2Seq.from_pretrained(tmp_path)
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    assert len({id(part.config) for part in parts}) == 3  # the model's, the text's, the pictures'
    assert any(hasattr(part.config, MARK) for part in parts if part is not model)
    model.dequantize()
    assert not any(
        hasattr(part.config, mark) for part in parts for mark in ("_pre_quantization_dtype", "_is_quantized")
    )
