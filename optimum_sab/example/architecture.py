"""The embedded example's architecture: a Qwen2.5-VL of about six million parameters."""

import pathlib
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from optimum_sab.example.chatml import TURN_END, TURN_START
from optimum_sab.example.processor import write_json

VOCABULARY_SIZE = 1024
PATCH_SIZE, MERGE_SIZE, TEMPORAL_PATCH_SIZE = 14, 2, 2
EMBEDDING_SCALE = 0.25
END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (
    END_OF_TEXT,
    TURN_START,
    TURN_END,
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def model_config() -> dict[str, object]:
    """The example's config.json, in the layout of Transformers 4, which 5 reads as well but not the other way round.

    The decoder's widths are multiples of 128, the block size of binarization.
    """
    tokens = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    ends = {"bos_token_id": tokens[END_OF_TEXT], "eos_token_id": tokens[TURN_END], "pad_token_id": tokens[END_OF_TEXT]}
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "dtype": "bfloat16",
        "tie_word_embeddings": True,
        "image_token_id": tokens["<|image_pad|>"],
        "video_token_id": tokens["<|video_pad|>"],
        "vision_start_token_id": tokens["<|vision_start|>"],
        "vision_end_token_id": tokens["<|vision_end|>"],
        **ends,
        "text_config": {
            "model_type": "qwen2_5_vl_text",
            "dtype": "bfloat16",
            "vocab_size": VOCABULARY_SIZE,
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "hidden_act": "silu",
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "initializer_range": 0.06,
            "use_sliding_window": False,
            "tie_word_embeddings": True,
            "rope_theta": 10000.0,
            "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
            **ends,
        },
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "dtype": "bfloat16",
            "depth": 4,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_heads": 4,
            "out_hidden_size": 256,
            "hidden_act": "silu",
            "in_channels": 3,
            "patch_size": PATCH_SIZE,
            "spatial_merge_size": MERGE_SIZE,
            "temporal_patch_size": TEMPORAL_PATCH_SIZE,
            "tokens_per_second": 2,
            "window_size": 112,
            "fullatt_block_indexes": [0, 1, 2, 3],
            "initializer_range": 0.05,
        },
    }


def build_model() -> Qwen2_5_VLForConditionalGeneration:
    """The untrained model in float32; its weights depend on torch's seed.

    Embeddings start large enough, and what a layer adds small enough, that a token is still recognizable behind the
    last layer; the last norm makes up for it, as embeddings are also the output layer. Small models learn to copy and
    to compare tokens much sooner from there.
    """
    config = Qwen2_5_VLConfig(**model_config())
    in_float32(config)
    model = Qwen2_5_VLForConditionalGeneration(config).float()
    decoder = model.model.language_model
    with torch.no_grad():
        decoder.embed_tokens.weight.normal_(std=EMBEDDING_SCALE)
        decoder.norm.weight.fill_(1 / (EMBEDDING_SCALE * config.text_config.hidden_size**0.5))
        for layer in decoder.layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight.mul_((2 * len(decoder.layers)) ** -0.5)
    return model


def in_float32(config: PretrainedConfig) -> None:
    """Have a configuration build its model in float32, whatever dtype it is stored in."""
    config.dtype = config.text_config.dtype = config.vision_config.dtype = torch.float32


def save_model(model: PreTrainedModel, folder: pathlib.Path, config: dict[str, Any] | None = None) -> None:
    """Write the weights in bfloat16 and the configuration in the layout both Transformers lines read.

    Args:
        model: the model.
        folder: of the checkpoint.
        config: its config.json; `model_config` by default.
    """
    state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    model.save_pretrained(folder, state_dict=state)
    config = model_config() if config is None else config
    write_json(folder / "config.json", config)
    ends = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(folder / "generation_config.json", {**ends, "do_sample": False})
