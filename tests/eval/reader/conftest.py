"""A tiny Llama with random weights of SmolLM2's width, and a folder shaped like the CIFAR-10 package."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionModel

from optimum_sab.eval.reader.sight import CANDIDATES
from optimum_sab.eval.reader.tasks import NAMING_PROMPTS, READING_PROMPTS
from optimum_sab.eval.reader.tower import tower_config

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def write_language(folder, width=576, model_type="llama"):
    """A checkpoint folder like SmolLM2's, with one token per word and one per remaining byte."""
    folder.mkdir()
    words = {f"Ġ{word.strip()}" for word in CANDIDATES if word.strip()}
    words |= {f"Ġ{word}" for prompt in (*READING_PROMPTS, *NAMING_PROMPTS) for word in prompt.split()}
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *pre_tokenizers.ByteLevel.alphabet()))}
    for word in sorted(words - vocabulary.keys()):
        vocabulary[word] = len(vocabulary)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {"bos_token": SPECIAL[1], "eos_token": SPECIAL[2], "pad_token": SPECIAL[2], "unk_token": SPECIAL[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        rope_theta=5000.0,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config.to_dict(), "model_type": model_type}))
    return folder


@pytest.fixture(scope="session")
def make_language():
    return write_language


@pytest.fixture(scope="session")
def language(tmp_path_factory):
    return write_language(tmp_path_factory.mktemp("reader") / "language")


@pytest.fixture(scope="session")
def vision(tmp_path_factory):
    """Untrained vision weights under the names of the trained ones."""
    path = tmp_path_factory.mktemp("vision") / "vision.safetensors"
    tower = SiglipVisionModel(tower_config()).state_dict()
    tensors = {f"vision_tower.vision_model.{name.removeprefix('vision_model.')}": each for name, each in tower.items()}
    generator = torch.Generator().manual_seed(1)
    for name, shape in (("linear_1", (576, 192)), ("linear_2", (576, 576))):
        tensors[f"multi_modal_projector.{name}.weight"] = torch.randn(shape, generator=generator) / shape[1] ** 0.5
        tensors[f"multi_modal_projector.{name}.bias"] = torch.zeros(shape[0])
    save_file({name: each.to(torch.bfloat16).contiguous() for name, each in tensors.items()}, path)
    return path


@pytest.fixture(scope="session")
def cifar(tmp_path_factory):
    """The package's files at their true sizes: every picture is one colour, which tells its number and half."""
    folder = tmp_path_factory.mktemp("cifar") / "package"
    folder.mkdir()
    names = [*(f"data_batch_{number}.png" for number in range(1, 6)), "test_batch.png"]
    for number, name in enumerate(names):
        colours = np.stack([np.arange(10_000) % 256, np.arange(10_000) // 256, np.full(10_000, number)], axis=1)
        pixels = np.broadcast_to(colours[:, None].astype(np.uint8), (10_000, 1024, 3))
        Image.fromarray(np.ascontiguousarray(pixels)).save(folder / name, compress_level=1)
    (folder / "train_lables.json").write_text(json.dumps([index % 10 for index in range(50_000)]))
    (folder / "test_lables.json").write_text(json.dumps([(index + 3) % 10 for index in range(10_000)]))
    return folder
