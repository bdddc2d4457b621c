"""What single families need that the names of their entries and arguments do not tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from optimum_sab.bench.coverage.shrinking import FIRST_SPECIAL, FIRST_TEXT, VOCABULARY, WIDTH
from optimum_sab.bench.coverage.values import Ids, NumberedPatches, PerToken, Random


@dataclass(frozen=True)
class Exceptions:
    """One family's.

    Attributes:
        default: arguments of the configuration from which all begins.
        config: entries of the small configuration by dotted name.
        mrope: frequencies of the small heads for time, height and width, where positions have these three.
        reads_pictures: whether it reads pictures at all.
        picture: arguments that hold a picture, in the place of or beside those that their names tell; None leaves one
            out.
        beside_picture: what a sample with a picture has besides, per token.
        tokens: placeholders of a picture; None to ask the model.
        placeholder: their token id; None to ask the configuration.
        sound: arguments that hold sound.
        sound_tokens: placeholders of a sound; None to ask the model.
        always: arguments of every sample.
        language: see `optimum_sab.bench.coverage.share.language_matrices`.
    """

    default: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    mrope: tuple[int, ...] = ()
    reads_pictures: bool = True
    picture: Mapping[str, Any] = field(default_factory=dict)
    beside_picture: Mapping[str, Any] = field(default_factory=dict)
    tokens: int | None = None
    placeholder: int | None = None
    sound: Mapping[str, Any] = field(default_factory=dict)
    sound_tokens: int | None = None
    always: Mapping[str, Any] = field(default_factory=dict)
    language: str | None = None


def exceptions_of(family: str) -> Exceptions:
    """The family's row of the table; an empty one where it has none."""
    return TABLE.get(family, Exceptions())


_VQ = {"num_embeddings": 16, "base_channels": 32, "channel_multiplier": [1, 1]}
_QWEN2, _QWEN3 = (4, 6, 6), (6, 5, 5)  # of the sixteen frequencies of a head
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [*_QWEN3]}
_SAM = {"output_channels": 32, "downsample_channels": [64, WIDTH]}
_CODES = VOCABULARY - 32  # ids of a picture's codes, where a model writes them as text
_PINPOINTS = {"image_grid_pinpoints": [[56, 56]]}
_TILES = {"pixel_values": Random((1, 2, 3, 56, 56)), "image_sizes": [[56, 56]]}
_QFORMER = {"qformer_input_ids": Ids((1, 8)), "qformer_attention_mask": [[1] * 8]}
_INKLING = {"pixel_values": Random((4, 40, 40, 3)), "image_grid_thw": [[1, 2, 2]]}
_LETTERS = "ABCDEFGHIJ"

TABLE: dict[str, Exceptions] = {
    "apertus1p5": Exceptions(
        config={
            "vision_config.codebook_size": 32,
            "vision_config.embed_dim": 32,
            "vision_config.latent_channels": 32,
            "vision_config.base_channels": 32,
            "vision_config.channel_multiplier": [1, 1],
            "vision_config.attn_resolutions": [],
            "audio_config.codebook_size": 32,
            "audio_config.codebook_dim": WIDTH,
            "image_token_offset": FIRST_SPECIAL + 60,
            "audio_token_offset": FIRST_SPECIAL + 92,
        },
        picture={"pixel_values": Random((1, 3, 8, 8)), "image_sizes": [[8, 8]]},
    ),
    "aria": Exceptions(config={"projector_patch_to_query_dict": {"16": 4}}),
    "blip-2": Exceptions(config={"num_query_tokens": 4}),
    "chameleon": Exceptions(
        config={
            **{f"vq_config.{name}": value for name, value in _VQ.items()},
            "vq_config.attn_resolutions": [],
            "vq_config.embed_dim": 32,
            "vq_config.latent_channels": 32,
            "vq_config.resolution": 16,
            "image_token_id": FIRST_SPECIAL + 90,
            "vocabulary_map": {
                "<image>": FIRST_SPECIAL + 90,
                **{f"IMGIMG{_LETTERS[i // 10]}{_LETTERS[i % 10]}Z": _CODES + i for i in range(16)},
            },
        },
        placeholder=FIRST_SPECIAL + 90,
        picture={"pixel_values": Random((1, 3, 16, 16))},
    ),
    "cohere_compass": Exceptions(
        config={"text_config.rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    ),
    "cosmos3_omni": Exceptions(mrope=_QWEN3),
    "deepseek_ocr2": Exceptions(
        config={
            **{f"vision_config.sam_config.{name}": value for name, value in _SAM.items()},
            "text_config.mlp_layer_types": ["dense", "sparse"],
            "text_config.num_experts_per_tok": 2,
        },
    ),
    "deepseek_vl_hybrid": Exceptions(picture={"high_res_pixel_values": Random((1, 3, 64, 64))}),
    "diffusion_gemma": Exceptions(
        config={
            "text_config.num_experts": 4,
            "text_config.top_k_experts": 2,
            "text_config.moe_intermediate_size": WIDTH,
            "canvas_length": 8,
        },
    ),
    "dots3_note": Exceptions(
        config={
            "vision_config.per_layer_config": {"01": {"num_local_experts": 4, "num_experts_per_tok": 2}},
            "text_config.per_layer_config": {
                "02": {
                    "num_attention_heads": 2,
                    "num_key_value_heads": 2,
                    "kv_lora_rank": 128,
                    "qk_nope_head_dim": 96,
                    "head_dim": 128,
                }
            },
        },
    ),
    "emu3": Exceptions(
        config={
            **{f"vq_config.{name}": value for name, value in _VQ.items() if name != "num_embeddings"},
            "vq_config.codebook_size": 16,
            "vq_config.embed_dim": 4,
            "vq_config.attn_resolutions": [],
            "vq_config.hidden_size": 32,
            "vq_config.num_attention_heads": 1,
            "image_token_id": FIRST_SPECIAL + 90,
            "vocabulary_map": {
                "<image>": FIRST_SPECIAL + 90,
                "<|extra_200|>": FIRST_SPECIAL + 91,
                **{f"<|visual token {i:06}|>": _CODES + i for i in range(16)},
            },
        },
        placeholder=FIRST_SPECIAL + 90,
        picture={"pixel_values": Random((1, 3, 16, 16)), "image_sizes": [[16, 16]]},
    ),
    "ernie4_5_vl_moe": Exceptions(mrope=(5, 5, 6)),
    "evolla": Exceptions(
        config={
            "protein_encoder_config.vocab_size": 446,
            "aligner_num_add_layers": 1,
            "resampler_num_latents": 4,
        },
        reads_pictures=False,
        always={"protein_input_ids": Ids((1, 12)), "protein_attention_mask": [[1] * 12]},
    ),
    "florence2": Exceptions(config={"vision_config.depths": [1, 1, 1, 1]}),
    "fuyu": Exceptions(config={"patch_size": 8, "image_size": 32}, picture={"pixel_values": Random((1, 16, 192))}),
    "gemma3": Exceptions(config={"mm_tokens_per_image": 4}),
    "gemma4": Exceptions(default={"vision_config": {"model_type": "gemma4_vision"}}),
    "gemma4_unified": Exceptions(
        default={"vision_config": {"model_type": "gemma4_unified_vision"}},
        config={"vision_config.patch_size": 4},
        picture={
            "pixel_values": Random((1, 4, 3 * 12 * 12)),
            "image_position_ids": [[[0, 0], [1, 0], [0, 1], [1, 1]]],
        },
    ),
    "git": Exceptions(tokens=0),
    **dict.fromkeys(("glm46v", "glm4v", "glm_ocr", "glmga"), Exceptions(mrope=_QWEN2)),
    "glm4v_moe": Exceptions(mrope=(2, 3, 3)),
    "granite4_vision": Exceptions(
        config={
            **_PINPOINTS,
            "vision_config.patch_size": 14,
            "vision_config.image_size": 56,
            "downsample_rate": "2/4",
            "deepstack_layer_map": [[-1, 0]],
            "spatial_target_layers": [1],
        },
        picture=_TILES,
    ),
    "granite_docling": Exceptions(picture={"pixel_attention_mask": [[True]]}),
    "granite_speech": Exceptions(
        config={"encoder_config.context_size": 16, "projector_config.encoder_hidden_size": WIDTH},
        sound={"input_features": Random((1, 30, 160))},
        language=r"(model\.)?language_model",
    ),
    "hunyuan_vl": Exceptions(mrope=(4, 4, 4, 4), config={"text_config.head_dim": 32}),
    "idefics": Exceptions(
        config={"vision_config.embed_dim": WIDTH, "additional_vocab_size": 0},
        picture={"pixel_values": Random((1, 1, 3, 56, 56))},
        beside_picture={"image_attention_mask": PerToken(shape=(1,))},
        tokens=0,
    ),
    "idefics2": Exceptions(config={"perceiver_config.resampler_n_latents": 4}),
    "inkling2": Exceptions(picture=_INKLING),
    "inkling2_loop": Exceptions(
        picture=_INKLING,
        config={
            "text_config.n_layers_per_attn_res_block": 1,
            "text_config.loop_layer_index_start": 1,
            "text_config.loop_layer_index_end": 2,
            "text_config.loop_num_passes": 2,
        },
    ),
    "inkling_mm_model": Exceptions(
        config={"vision_config.patch_size": 4, "vision_config.n_layers": 4},
        picture={"pixel_values": Random((4, 2, 4, 4, 3))},
    ),
    "instructblip": Exceptions(config={"num_query_tokens": 4}, always=_QFORMER, tokens=4),
    "instructblipvideo": Exceptions(
        config={"num_query_tokens": 4, "video_token_index": FIRST_SPECIAL + 90},
        picture={"pixel_values": Random((1, 2, 3, 56, 56))},
        always=_QFORMER,
        tokens=8,
    ),
    "janus": Exceptions(
        config={f"vq_config.{name}": value for name, value in _VQ.items()} | {"vq_config.embed_dim": 8},
    ),
    "kimi_k25": Exceptions(
        config={"projection_hidden_size": WIDTH},
        picture={"pixel_values": Random((16, 3, 14, 14)), "image_grid_thw": [[1, 4, 4]]},
    ),
    "kosmos-2": Exceptions(
        config={"latent_query_num": 4, "text_config.attention_heads": 4},
        beside_picture={"image_embeds_position_mask": PerToken(text=0, picture=1)},
        tokens=4,
        placeholder=FIRST_TEXT,
    ),
    "kosmos-2.5": Exceptions(
        config={"latent_query_num": 4},
        picture={"pixel_values": None, "flattened_patches": NumberedPatches(4, 4, WIDTH), "width": [4], "height": [4]},
        beside_picture={"image_embeds_position_mask": PerToken(text=0, picture=1)},
        tokens=4,
        placeholder=FIRST_TEXT,
    ),
    "lfm2_vl": Exceptions(
        config={"text_config.layer_types": ["conv", "full_attention"], "text_config.num_hidden_layers": 2},
    ),
    "llama4": Exceptions(config={"vision_config.intermediate_size": 4 * WIDTH}),
    "llava": Exceptions(picture={"image_sizes": None}),
    "llava_next": Exceptions(config=_PINPOINTS, picture=_TILES),
    "llava_next_video": Exceptions(config=_PINPOINTS, picture=_TILES),
    "llava_onevision": Exceptions(config=_PINPOINTS, picture=_TILES),
    "mamba2": Exceptions(config={"head_dim": 64}),
    "minimax_m3_vl": Exceptions(config={"merged_hidden_size": 1024}),
    "mistral4": Exceptions(config={"head_dim": 64}, reads_pictures=False),
    "mllama": Exceptions(
        default={"text_config": {"rope_scaling": {"rope_type": "default"}}},  # Transformers 4.57 has no other
        config={
            "vision_config.num_global_layers": 1,
            "vision_config.intermediate_layers_indices": [1],
            "vision_config.vision_output_dim": 2 * WIDTH,
            "text_config.cross_attention_layers": [1],
        },
        picture={
            "pixel_values": Random((1, 1, 4, 3, 56, 56)),
            "aspect_ratio_ids": [[1]],
            "aspect_ratio_mask": [[[1, 0, 0, 0]]],
        },
        beside_picture={"cross_attention_mask": PerToken(shape=(1, 4))},
        tokens=1,
    ),
    "molmo2": Exceptions(
        config={
            "text_config.additional_vocab_size": 16,
            "vision_config.num_position_embeddings": 16,
            "adapter_config.vision_feature_layer": [-1, -2],
        },
        picture={
            "pixel_values": Random((1, 16, 3 * 14 * 14)),
            "image_token_pooling": [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]],
            "image_grids": [[0, 0, 2, 2]],
            "image_num_crops": [1],
        },
    ),
    "muse_glimmer": Exceptions(config={"out_hidden_size": 4 * WIDTH}),
    "muse_spark": Exceptions(
        config={
            "out_hidden_size": 4 * WIDTH,
            "audio_config.hidden_sizes": [16, 32, 64, WIDTH],
            "audio_config.depths": [1, 1, 1, 1],
        },
    ),
    "paddleocr_vl": Exceptions(
        mrope=_QWEN2, picture={"pixel_values": Random((16, 3, 14, 14)), "image_grid_thw": [[1, 4, 4]]}
    ),
    "pi0": Exceptions(
        config={"chunk_size": 4},
        picture={"pixel_values": Random((1, 1, 3, 56, 56)), "pixel_attention_mask": [[True]]},
        always={"state": Random((1, 32)), "noise": Random((1, 4, 32)), "timestep": [0.5]},
    ),
    "pix2struct": Exceptions(
        config={"vision_config.seq_len": 64},
        picture={"pixel_values": None, "flattened_patches": NumberedPatches(4, 4, WIDTH)},
        language="decoder",
    ),
    "pp_formulanet": Exceptions(always={"input_ids": None, "attention_mask": None}, language=r"model\.decoder"),
    "qwen2_5_vl": Exceptions(mrope=_QWEN2),
    "qwen2_audio": Exceptions(
        config={"audio_config.max_source_positions": 16},
        sound={"input_features": Random((1, 128, 32)), "feature_attention_mask": [[1] * 32]},
        sound_tokens=8,
    ),
    "qwen2_5_omni_thinker": Exceptions(
        default={"vision_start_token_id": 151652, "vision_end_token_id": 151653},
        mrope=_QWEN2,
        config={"audio_config.max_source_positions": 64, "audio_config.n_window": 16},
        sound={"input_features": Random((1, 128, 32)), "feature_attention_mask": [[1] * 32]},
        sound_tokens=8,
    ),
    "qwen2_vl": Exceptions(mrope=_QWEN2),
    "qwen3_5": Exceptions(mrope=(2, 1, 1)),
    "qwen3_5_moe": Exceptions(mrope=(2, 1, 1)),
    "qwen3_omni_moe_thinker": Exceptions(
        default={"vision_start_token_id": 151652, "vision_end_token_id": 151653}, mrope=_QWEN3
    ),
    "qwen3_vl": Exceptions(mrope=_QWEN3),
    "qwen3_vl_moe": Exceptions(mrope=_QWEN3),
    "qwen4_exp": Exceptions(
        mrope=_QWEN3,
        config={
            "text_config.ngram_vocab_size_base": 512,
            "text_config.split_ngram_parts": 4,
            "text_config.indexer_n_heads": 4,
            "text_config.indexer_kv_heads": 1,
            "text_config.indexer_head_dim": 32,
            "text_config.indexer_budget": 64,
            "text_config.indexer_compress_ratio": 4,
        },
    ),
    "shieldgemma2": Exceptions(config={"mm_tokens_per_image": 4}),
    "step3p7": Exceptions(config={"text_config.sliding_window": 512}),
    "t5gemma2": Exceptions(config={"encoder.mm_tokens_per_image": 4}),
    "udop": Exceptions(
        default={"decoder_start_token_id": 0}, always={"bbox": PerToken(text=0.5, shape=(4,))}, tokens=0
    ),
    "unlimited_ocr": Exceptions(config={f"vision_config.sam_config.{k}": v for k, v in _SAM.items()}),
    "vipllava": Exceptions(
        default={"vision_feature_layer": [-1, -2], "vision_feature_layers": [-1, -2]},  # one each by line
    ),
    "vision-encoder-decoder": Exceptions(
        default={
            "encoder": {"model_type": "vit"},
            "decoder": {"model_type": "trocr", "is_decoder": True, "add_cross_attention": True},
            "decoder_start_token_id": 1,
        },
        picture={"pixel_values": Random((1, 3, 64, 64))},
        tokens=0,
        language="decoder",
    ),
    "voxtral": Exceptions(
        config={
            "audio_config.max_source_positions": 16,
            "audio_config.intermediate_size": 4 * WIDTH,
            "audio_token_id": FIRST_SPECIAL + 90,
        },
        sound={"input_features": Random((1, 128, 32))},
    ),
}
