"""A small language model and the embedded example, dense and packed, made once per run."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from optimum_sab import AutoModelForVision2Seq, SABConfig
from optimum_sab.bench.qwen import random_model
from optimum_sab.example import checkpoint_path
from optimum_sab.hf.processor import load_processor
from optimum_sab.hf.quantizer import SABHfQuantizer

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items):
    """This folder touches Transformers and runs under every supported line, but for the replacing of folders."""
    for item in items:
        if FOLDER in item.path.parents and FOLDER / "output" not in item.path.parents:
            item.add_marker(pytest.mark.compat)


@pytest.fixture(scope="session")
def texts():
    """Short calibration texts."""
    colours = ["red", "blue"] * 16
    return [f"Sample {i}: the {c} boat left the harbour at {i + 3} o'clock." for i, c in enumerate(colours)]


@pytest.fixture(scope="session")
def quick_config():
    """`SABConfig` with few, short samples: what is tested is the path, not the quality."""

    def make(**changes):
        settings = {"calibration_samples": 8, "sequence_length": 64, "iterations": 2, "progress": "none"}
        settings |= {"examples": False, **changes}
        return SABConfig(**settings)

    return make


@pytest.fixture(scope="session")
def quicker_config(quick_config):
    """`quick_config` without the parts of a run that choose, descend or measure."""
    plain = {"allocation": "uniform", "sweeps": 0, "temperature_scaling": False}
    return lambda **changes: quick_config(**{**plain, **changes})


@pytest.fixture
def unread(monkeypatch):
    """A weight that is read is an error."""

    def read(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", read)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory):
    """An untied Llama of two blocks with odd sizes (in_features is no multiple of the block), and a tokenizer."""
    return save_llama(tmp_path_factory.mktemp("llama"), blocks=2)


def save_llama(folder, blocks, **sharding):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=144,
        intermediate_size=200,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder, **sharding)
    AutoTokenizer.from_pretrained(checkpoint_path()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def example(small_example):
    return small_example


@pytest.fixture(scope="session")
def example_packed(example, quick_config, tmp_path_factory):
    """The example packed by `from_pretrained`: (model, folder it was saved to)."""
    folder = tmp_path_factory.mktemp("example-sab")
    model = AutoModelForVision2Seq.from_pretrained(example, dtype=torch.float32, quantization_config=quick_config())
    model.save_pretrained(folder)
    load_processor(example).save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="session")
def packed_vlm():
    """A small vision-language model with random packed layers, as the quantizer leaves one."""

    def make(seed=0, dtype=torch.float32):
        config = SABConfig()
        model = random_model("tiny", config.layer_settings, torch.device("cpu"), dtype, seed)
        model.hf_quantizer = SABHfQuantizer(config)
        model.config.quantization_config = model.hf_quantizer.quantization_config
        return model

    return make


@pytest.fixture
def token_ids():
    return torch.arange(20, 60)[None]


@pytest.fixture(scope="session")
def mixture(llama_folder, tmp_path_factory):
    """A Mixtral, whose tensors have other names on disk and whose experts are merged when they are read."""
    folder = tmp_path_factory.mktemp("mixture")
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "mixtral",
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=1024,
        num_local_experts=4,
        num_experts_per_tok=2,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(llama_folder).save_pretrained(folder)
    return folder
