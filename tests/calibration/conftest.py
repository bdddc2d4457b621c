"""Tiny random models of several families, and samples that fit them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from optimum_sab.nn.decoder import find_decoder_blocks

VERSION_5 = int(transformers.__version__.split(".")[0]) >= 5
IMAGE = 60  # placeholder token id of every vision-language model here
TEXT = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # activations that differ visibly from token to token
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
VISION = {"hidden_size": 16, "intermediate_size": 16, "patch_size": 4}


@dataclass
class Subject:
    """A model under calibration.

    Attributes:
        embedding: dotted names of the modules that run once per forward (and, with pictures, of the vision tower).
    """

    model: nn.Module
    samples: list[dict[str, Any]]
    embedding: str
    tower: str | None = None
    pictured: tuple[int, ...] = field(default=())

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        return find_decoder_blocks(self.model).blocks

    @property
    def linears(self) -> list[dict[str, nn.Linear]]:
        """Every linear of every decoder block by dotted name."""
        prefix = find_decoder_blocks(self.model).lists.names[0]
        return [
            {f"{prefix}.{i}.{n}": m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
            for i, block in enumerate(self.blocks)
        ]


def _text(*lengths: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(2, IMAGE, (1, n), generator=generator)} for n in lengths]


def _llama() -> Subject:
    config = transformers.LlamaConfig(**TEXT, attention_bias=True)
    return Subject(transformers.LlamaForCausalLM(config), _text(9, 5, 1), "model.embed_tokens")


def _gemma3() -> Subject:
    config = transformers.Gemma3TextConfig(
        **TEXT, head_dim=16, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
    )
    return Subject(transformers.Gemma3ForCausalLM(config), _text(11, 3, 7), "model.embed_tokens")


def _qwen_samples() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(2)
    samples = []
    for grid in ([[1, 4, 4]], [], [[1, 2, 4], [1, 4, 2]]):
        ids = [5, 9, 11]
        for frames, height, width in grid:
            ids += [62, *[IMAGE] * (frames * height * width // 4), 63, 7, 8, 9]
        tokens = torch.tensor([[*ids, 20, 21, 22, 23]])
        sample: dict[str, Any] = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if VERSION_5:
            sample["mm_token_type_ids"] = (tokens == IMAGE).long()
        if grid:
            patches = sum(t * h * w for t, h, w in grid)
            sample["pixel_values"] = torch.randn(patches, 3 * 2 * 4 * 4, generator=generator)
            sample["image_grid_thw"] = torch.tensor(grid)
        samples.append(sample)
    return samples


_QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": 61,
    "vision_start_token_id": 62,
    "vision_end_token_id": 63,
}


def _qwen2_5_vl() -> Subject:
    config = transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}},
        vision_config={
            **VISION,
            "depth": 1,
            "num_heads": 2,
            "out_hidden_size": 64,
            "window_size": 16,
            "fullatt_block_indexes": [0],
        },
        **_QWEN_TOKENS,
    )
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    return Subject(model, _qwen_samples(), "model.language_model.embed_tokens", "model.visual", (0, 2))


def _qwen3_vl() -> Subject:
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    config = transformers.Qwen3VLConfig(
        text_config={**TEXT, "num_hidden_layers": 3, "head_dim": 16, "rope_scaling": rope},
        vision_config={
            **VISION,
            "depth": 2,
            "num_heads": 2,
            "out_hidden_size": 64,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
        **_QWEN_TOKENS,
    )
    model = transformers.Qwen3VLForConditionalGeneration(config)
    return Subject(model, _qwen_samples(), "model.language_model.embed_tokens", "model.visual", (0, 2))


def _llava() -> Subject:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            **VISION, num_hidden_layers=2, num_attention_heads=2, image_size=8, projection_dim=16
        ),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
    )
    pictured = {
        "input_ids": torch.tensor([[5, *[IMAGE] * 4, 7, 8]]),
        "pixel_values": torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(3)),
    }
    model = transformers.LlavaForConditionalGeneration(config)
    return Subject(model, [*_text(6), pictured], "model.language_model.embed_tokens", "model.vision_tower", (1,))


FAMILIES: dict[str, Callable[[], Subject]] = {
    "llama": _llama,
    "gemma3": _gemma3,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "llava": _llava,
}


def build(family: str) -> Subject:
    torch.manual_seed(0)
    subject = FAMILIES[family]()
    subject.model.float().eval()
    with torch.no_grad():
        for name, parameter in subject.model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.1)  # Transformers starts biases at zero, where a lost one is not missed
    return subject


@pytest.fixture(params=FAMILIES)
def subject(request: pytest.FixtureRequest) -> Subject:
    """Every family in turn."""
    return build(request.param)


@pytest.fixture(name="build", scope="session")
def build_fixture() -> Callable[[str], Subject]:
    return build
