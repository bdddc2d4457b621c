"""From a family's default configuration to the smallest one that still has everything: by the names of its entries.

One width, one number of heads and one inner width serve every part, so that projectors, encoders and decoders fit
without knowing which is attached to which.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH, INNER, HEADS, GROUPS, HEAD, LAYERS, EXPERTS, LATENT = 128, 256, 4, 2, 32, 2, 4, 64
VOCABULARY, FIRST_TEXT, FIRST_SPECIAL = 512, 64, 384  # text is drawn from [FIRST_TEXT, FIRST_SPECIAL)
PATCHES = 4  # a picture is this many patches high and wide
POSITIONS = 64  # of a picture's patches, where they are learned

_LAYER_COUNTS = (
    "num_hidden_layers",
    "depth",
    "num_layers",
    "layers",
    "n_layers",
    "encoder_layers",
    "decoder_layers",
    "num_decoder_layers",
    "decoder_num_layers",
    "resampler_depth",
)
_SIZES = (
    (
        WIDTH,
        "hidden_size d_model embed_dim hidden_dim n_embd encoder_hidden_size out_hidden_size projection_dim "
        "text_hidden_size vision_hidden_size vision_output_dim output_dim output_proj_dims adapter_in_dim "
        "adapter_out_dim adapter_input_size decoder_hidden_size projector_input_dim projector_output_dim "
        "mm_embed_dim image_token_embed_dim patch_embed_hidden_size word_embed_proj_dim pooler_output_size "
        "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size "
        "shared_intermediate_size share_expert_dim moe_shared_expert_intermediate_size moe_hidden_size",
    ),
    (
        INNER,
        "intermediate_size ffn_dim d_ff mlp_dim encoder_ffn_dim decoder_ffn_dim intermediate_size_mlp "
        "dense_intermediate_size projector_hidden_size projection_hidden_size projection_hidden_dim "
        "projection_intermediate_size alignment_intermediate_size decoder_intermediate_size mamba_d_ssm",
    ),
    (
        HEADS,
        "num_attention_heads num_heads attention_heads encoder_attention_heads decoder_attention_heads "
        "swa_num_attention_heads index_n_heads indexer_n_heads num_sliding_attention_heads resampler_n_heads "
        "resampler_heads linear_num_heads linear_num_value_heads mamba_num_heads mamba_n_heads",
    ),
    (EXPERTS, "n_routed_experts num_experts num_local_experts moe_num_experts"),
    (
        HEAD,
        "head_dim swa_head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim index_head_dim indexer_head_dim d_kv "
        "linear_head_dim linear_key_head_dim linear_value_head_dim resampler_head_dim resampler_dim_head dim_head "
        "query_pre_attn_scalar rotary_dim ssm_state_size mamba_d_state state_size",
    ),
    (INNER // HEADS, "mamba_head_dim mamba_d_head"),
    (LATENT, "kv_lora_rank q_lora_rank codebook_size num_embeddings"),
    (POSITIONS, "num_position_embeddings position_embedding_size mm_posemb_size seq_len"),
    (VOCABULARY, "vocab_size vocab_size_per_layer_input unpadded_vocab_size output_vocab_size"),
    (GROUPS, "num_experts_per_tok moe_topk top_k_experts moe_k num_experts_per_token n_groups"),
    (1, "n_group topk_group first_k_dense_replace num_res_blocks"),
    (0, "num_kv_shared_layers num_nextn_predict_layers num_mtp_layers insert_layer_id"),
)
_SIZE_OF = {name: size for size, names in _SIZES for name in names.split()}
_PER_GROUP = ("num_key_value_heads", "swa_num_key_value_heads", "indexer_kv_heads", "linear_num_key_heads")
_INDICES = ("indexes", "indices", "idxs", "layer_ids", "cross_attention_layers", "mlp_only_layers", "moe_layers")
_PER_LAYER = "per_layer_config"
_TOKEN = re.compile(r"_(?:token_)?(?:id|index|ids)$")
_PICTURE = ("image_token_id", "image_token_index")


def shrink(config: Mapping[str, Any]) -> dict[str, Any]:
    """A small configuration of the same kind.

    Widths, heads, layers, experts and vocabulary are set wherever an entry of the name stands, in all parts alike. Of
    lists with an entry for every layer the first layer of each kind stays; token ids beyond the new vocabulary become
    others, the same in all parts.

    Args:
        config: a default configuration as `PretrainedConfig.to_dict` gives it.
    """
    return _part(config, _Tokens())


class _Tokens:
    """New ids for those beyond the text's, each its own."""

    def __init__(self) -> None:
        self._new: dict[object, int] = {}

    def renamed(self, token: int) -> int:
        """The id in the small vocabulary."""
        return token if token < FIRST_TEXT else self._next(token)

    def fresh(self) -> int:
        """An id that nothing else has."""
        return self._next(object())

    def _next(self, key: object) -> int:
        return self._new.setdefault(key, FIRST_SPECIAL + len(self._new))


def _part(config: Mapping[str, Any], tokens: _Tokens) -> dict[str, Any]:
    count, kept = _kept_layers(config)
    small: dict[str, Any] = {}
    for name, value in config.items():
        if name == _PER_LAYER and value:
            small[name] = _per_layer(value, config, kept)
        elif isinstance(value, Mapping):
            is_part = "model_type" in value or name.endswith("_config") or name in ("encoder", "decoder")
            small[name] = _part(value, tokens) if is_part else dict(value)
        elif _is_range(value, count):
            small[name] = list(range(len(kept)))
        elif isinstance(value, (list, tuple)) and len(value) == count and count > 1 and not name.endswith(_INDICES):
            small[name] = [_entry(name, value[index], config, tokens) for index in kept]
        elif name in _LAYER_COUNTS and isinstance(value, int):
            small[name] = len(kept) if value == count else min(value, LAYERS)
        else:
            small[name] = _entry(name, value, config, tokens)
    for name in ("rope_parameters", "rope_scaling"):
        if small.get(name):
            small[name] = _rope(small[name], _old_head(config))
    if "qk_head_dim" in small:
        small["qk_head_dim"] = small["qk_nope_head_dim"] + small["qk_rope_head_dim"]
    return small


def _kept_layers(config: Mapping[str, Any]) -> tuple[int, list[int]]:
    """The number of layers, and which of them stay: the first of each kind, and at least two."""
    counts = [config[name] for name in _LAYER_COUNTS if isinstance(config.get(name), int)]
    if not counts or counts[0] < 1:
        return 0, []
    count = counts[0]
    lists = [
        value
        for name, value in config.items()
        if isinstance(value, (list, tuple))
        and len(value) == count
        and not name.endswith(_INDICES)
        and not _is_range(value, count)
    ]
    first = {tuple(str(each[index]) for each in lists): index for index in reversed(range(count))}
    kept = sorted(first.values())
    others = [index for index in range(count) if index not in kept]
    return count, sorted(kept + others[: max(0, LAYERS - len(kept))])


def _is_range(value: Any, count: int) -> bool:
    return isinstance(value, (list, tuple)) and count > 1 and list(value) == list(range(count))


def _per_layer(
    value: Mapping[str, Mapping[str, Any]], config: Mapping[str, Any], kept: Sequence[int]
) -> dict[str, Any]:
    """What single layers have otherwise than the rest, in the old proportion to it."""
    by_layer = {int(layer): changes for layer, changes in value.items()}
    return {
        f"{new:02}": {name: _in_proportion(name, each, config) for name, each in by_layer[old].items()}
        for new, old in enumerate(kept)
        if old in by_layer
    }


def _in_proportion(name: str, value: Any, config: Mapping[str, Any]) -> Any:
    usual = config.get(name)
    if name not in {*_SIZE_OF, *_PER_GROUP} or not isinstance(value, int) or not isinstance(usual, int) or not usual:
        return value
    small: int = _entry(name, usual, config, _Tokens())
    return small * value // usual


def _entry(name: str, value: Any, config: Mapping[str, Any], tokens: _Tokens) -> Any:
    """One entry at its new value; what has no rule stays."""
    if value is None and name in _PICTURE:
        return tokens.fresh()
    if value is None or isinstance(value, (bool, str)):
        return value
    if name.endswith(_INDICES) and isinstance(value, (list, tuple)):
        return [LAYERS - 1] if value else []
    if name == "image_size":
        return _picture_size(value, config.get("patch_size"))
    if isinstance(value, (list, tuple)):
        return [_entry(name, each, config, tokens) for each in value]
    if not isinstance(value, int):
        return value
    if name in _PER_GROUP:
        own = config.get(name.replace("key_value", "attention").replace("key_heads", "value_heads"))
        return HEADS if value == own else min(value, GROUPS)
    if name in _SIZE_OF:
        return _SIZE_OF[name] if value > 0 else value
    return tokens.renamed(value) if _TOKEN.search(name) and "layer" not in name else value


def _picture_size(size: Any, patch: Any) -> Any:
    if isinstance(size, (list, tuple)):
        return [_picture_size(each, patch) for each in size]
    if isinstance(patch, (list, tuple)):
        patch = patch[0]
    return PATCHES * patch if isinstance(patch, int) else size


def _old_head(config: Mapping[str, Any]) -> int:
    """Width of a head in the default configuration."""
    own = config.get("head_dim")
    if isinstance(own, int) and own > 0:
        return own
    width, heads = config.get("hidden_size"), config.get("num_attention_heads")
    return width // heads if isinstance(width, int) and isinstance(heads, int) else HEAD


def _rope(rope: Mapping[str, Any], head: int) -> dict[str, Any]:
    """Rotary positions with as many frequencies as the new heads have, per axis in the old proportion."""
    small: dict[str, Any] = {
        name: _rope(value, head) if isinstance(value, Mapping) else value for name, value in rope.items()
    }
    sections = small.get("mrope_section")
    if sections:
        new = [each * HEAD // head for each in sections]
        new[0] += sum(sections) * HEAD // head - sum(new)
        small["mrope_section"] = new
    return small
