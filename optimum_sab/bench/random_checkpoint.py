"""Checkpoints of random weights in the shapes of large models, written shard by shard."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from optimum_sab.bench import qwen
from optimum_sab.errors import ConfigError
from optimum_sab.example import checkpoint_path
from optimum_sab.example.architecture import model_config
from optimum_sab.example.processor import write_json
from optimum_sab.format.random_weight import SCALE
from optimum_sab.hf.tensor_file import write_holes
from optimum_sab.wording import did_you_mean

_TEXT_30B_A3B = {  # of Qwen3-VL-30B-A3B
    "model_type": "qwen3_vl_moe_text",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
    "max_position_embeddings": 262144,
    "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True},
    "tie_word_embeddings": False,
}
_VISION_30B_A3B = {
    **qwen.QWEN3_VISION,
    "model_type": "qwen3_vl_moe",
    "out_hidden_size": 2048,
    "hidden_act": "gelu_pytorch_tanh",
    "in_channels": 3,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_MIXTURES: Mapping[str, Mapping[str, Any]] = {  # what is other than with the first of them
    "30b-a3b": {},
    "235b-a22b": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
    },
}
SIZES = (*qwen.SIZES, *_MIXTURES)
_PROCESSOR = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json")
_STEP = 2**24  # values that are drawn at a time


@dataclass(frozen=True)
class RandomCheckpoint:
    """What is written.

    Args:
        size: one of `SIZES`.
        blocks: decoder blocks; None for as many as the size has.
        dtype: of all weights.
        seed: of their values. Every tensor has a generator of its own, so a model cut to fewer blocks has the same.
        shard_bytes: of a file, at most, but for a tensor that is larger by itself.
        values: whether there are any: without, files have headers and holes, which take no room on most disks.
    """

    size: str
    blocks: int | None = None
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0
    shard_bytes: int = 10**9
    values: bool = True

    def model(self) -> Any:
        """The model without weights.

        Raises:
            ConfigError: the size is unknown.
        """
        if self.size not in SIZES:
            raise ConfigError(f"--size {self.size!r} must be one of {', '.join(SIZES)}{did_you_mean(self.size, SIZES)}")
        config: Any
        if self.size in _MIXTURES:
            text = {**_TEXT_30B_A3B, **_MIXTURES[self.size]}
            if self.blocks is not None:
                text["num_hidden_layers"] = self.blocks
            vision = {**_VISION_30B_A3B, "out_hidden_size": text["hidden_size"]}
            config = Qwen3VLMoeConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
            kind: Any = Qwen3VLMoeForConditionalGeneration
        else:
            config = qwen.model_config(self.size, self.blocks)
            kind = qwen.model_class(self.size)
        for name, token in _special_tokens().items():
            setattr(config, name, token)
        with qwen.parameters_on_meta():
            model = kind(config)
        model.config.dtype = self.dtype
        return model

    def write(self, folder: Path) -> None:
        """Write weights, configuration, and the embedded example's processor, whose tokens the model's are.

        Args:
            folder: that is there.

        Raises:
            ConfigError: see `model`.
            OSError: it cannot be written.
        """
        model = self.model()
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        ends = ("bos_token_id", "eos_token_id", "pad_token_id")
        told = {name: token for name, token in _special_tokens().items() if name in ends}
        write_json(folder / "generation_config.json", {**told, "do_sample": False})
        for name in _PROCESSOR:
            shutil.copyfile(checkpoint_path() / name, folder / name)
        pixels = folder / "preprocessor_config.json"
        patch = model.config.vision_config.patch_size
        write_json(pixels, {**json.loads(pixels.read_text(encoding="utf-8")), "patch_size": patch})
        self._write_shards(folder, {name: value.shape for name, value in model.named_parameters()})

    def _write_shards(self, folder: Path, shapes: Mapping[str, torch.Size]) -> None:
        shards = list(self._shards(shapes))
        places = {}
        for index, names in enumerate(shards, 1):
            file = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
            if self.values:
                save_file({name: self.weight(name, shapes[name]) for name in names}, folder / file, {"format": "pt"})
            else:
                hollow = {name: torch.empty(shapes[name], dtype=self.dtype, device="meta") for name in names}
                write_holes(hollow, folder / file, {"format": "pt"})
            places.update(dict.fromkeys(names, file))
        size = sum(shape.numel() for shape in shapes.values()) * self.dtype.itemsize
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": places})

    def _shards(self, shapes: Mapping[str, torch.Size]) -> Iterator[list[str]]:
        names: list[str] = []
        room = self.shard_bytes
        for name, shape in shapes.items():
            size = shape.numel() * self.dtype.itemsize
            if names and size > room:
                yield names
                names, room = [], self.shard_bytes
            names.append(name)
            room -= size
        yield names

    def weight(self, name: str, shape: torch.Size) -> Tensor:
        """Of matrices normal with a deviation of `SCALE`; vectors are those of a new model: ones, and biases zero."""
        if len(shape) < 2:
            return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=self.dtype)
        seed = int.from_bytes(hashlib.sha256(f"{self.seed} {name}".encode()).digest()[:7], "little")
        generator = torch.Generator().manual_seed(seed)
        found = torch.empty(shape, dtype=self.dtype)
        for part in found.view(-1).split(_STEP):
            part.copy_(torch.randn(part.shape, generator=generator) * SCALE)
        return found


def _special_tokens() -> dict[str, Any]:
    return {name: value for name, value in model_config().items() if name.endswith("_token_id")}
