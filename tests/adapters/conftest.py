"""A small language model with packed layers of random content, and the same one with dense weights."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_sab import SABConfig
from optimum_sab.bench.random_layers import random_linear
from optimum_sab.hf.quantizer import SABHfQuantizer
from optimum_sab.nn.modules import set_module
from optimum_sab.nn.selection import select_linears

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items):
    """This folder touches Transformers and runs under every supported line."""
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.compat)


@pytest.fixture(scope="session")
def random_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    settings = SABConfig()
    for seed, (name, own) in enumerate(select_linears(model, settings.layer_settings).settings.items()):
        dense = model.get_submodule(name)
        set_module(model, name, random_linear(dense.out_features, dense.in_features, own, seed))
    model.hf_quantizer = SABHfQuantizer(settings, pre_quantized=True)
    model.hf_quantizer.postprocess_model(model)
    model.is_quantized, model.quantization_method = True, settings.quant_method
    model.config._pre_quantization_dtype = torch.float32  # 4.57 deletes it in dequantize()
    return model


@pytest.fixture
def packed(random_llama):
    """As `from_pretrained` leaves a packed model."""
    return copy.deepcopy(random_llama)


@pytest.fixture
def dense(random_llama):
    """The same model with the dequantized weights."""
    return copy.deepcopy(random_llama).dequantize()


@pytest.fixture
def token_ids():
    return torch.arange(2, 26).view(2, 12)


@pytest.fixture
def moved():
    """Shift everything that is trained by the same random numbers, so that an adapter does something."""

    def move(model, size=0.1):
        generator = torch.Generator().manual_seed(1)
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.data += (size * torch.randn(parameter.shape, generator=generator)).to(parameter)
        return model

    return move
