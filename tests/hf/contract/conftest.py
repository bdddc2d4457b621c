"""A small Llama with random packed layers: what is tested here is what Transformers does with it."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from optimum_sab import SABConfig
from optimum_sab.bench.random_layers import random_linear
from optimum_sab.example import checkpoint_path
from optimum_sab.hf.quantizer import SABHfQuantizer
from optimum_sab.nn.modules import set_module
from optimum_sab.nn.selection import select_linears


@dataclass(frozen=True)
class Pair:
    """Checkpoints of one model, before and after."""

    dense: Path
    packed: Path


def llama(**changes):
    settings = {
        "vocab_size": 1024,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))


def pack(model):
    """Give a dense model random packed layers, as the quantizer leaves them."""
    config = SABConfig()
    for seed, (name, settings) in enumerate(select_linears(model, config.layer_settings).settings.items()):
        dense = model.get_submodule(name)
        bias = None if dense.bias is None else torch.randn(dense.out_features) / 8
        set_module(model, name, random_linear(dense.out_features, dense.in_features, settings, seed, "cpu", bias))
    model.hf_quantizer = SABHfQuantizer(config)
    model.config.quantization_config = model.hf_quantizer.quantization_config
    return model.eval()


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("contract")
    for name, model in (("dense", llama()), ("packed", pack(llama()))):
        model.save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(checkpoint_path()).save_pretrained(folder / name)
    return Pair(folder / "dense", folder / "packed")


@pytest.fixture(scope="session")
def tied(tmp_path_factory):
    """A packed checkpoint whose head is the embedding."""
    folder = tmp_path_factory.mktemp("tied")
    pack(llama(tie_word_embeddings=True)).save_pretrained(folder)
    return folder


@pytest.fixture
def model(pair):
    """The packed model, loaded in float32."""
    return AutoModelForCausalLM.from_pretrained(pair.packed, dtype=torch.float32)


@pytest.fixture
def ids():
    return torch.arange(20, 28)[None]


@pytest.fixture
def logits(ids):
    def of(model):
        with torch.no_grad():
            return model(input_ids=ids).logits

    return of


@pytest.fixture
def continued(ids):
    """The tokens that a model goes on with."""

    def of(model, **settings):
        return model.generate(ids, max_new_tokens=4, do_sample=False, **settings)

    return of
