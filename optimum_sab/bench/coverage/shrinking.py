"""From a family's default configuration to the smallest one that still has everything: by the names of its entries.

One width, one number of heads and one inner width serve every part, so that projectors, encoders and decoders fit without
knowing which is attached to which.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

WIDTH, INNER, HEADS, GROUPS, HEAD, LAYERS, EXPERTS, LATENT = 128, 256, 4, 2, 32, 2, 4, 64
VOCABULARY, FIRST_TEXT, FIRST_SPECIAL = 512, 64, 384  # text is drawn from [FIRST_TEXT, FIRST_SPECIAL)
PATCHES = 4  # a picture is this many patches high and wide

_LAYER_COUNTS = ("num_hidden_layers", "depth", "num_layers", "layers", "encoder_layers", "decoder_layers")
_SIZES: dict[str, tuple[str, ...]] = {
    "WIDTH": (
        "hidden_size d_model embed_dim hidden_dim n_embd encoder_hidden_size out_hidden_size projection_dim "
        "text_hidden_size vision_hidden_size vision_output_dim output_dim output_proj_dims adapter_in_dim "
        "adapter_out_dim adapter_input_size decoder_hidden_size thinker_hidden_size projector_input_dim "
        "projector_output_dim text_config_hidden_size mm_embed_dim image_token_embed_dim patch_embed_hidden_size "
        "audio_embed_dim word_embed_proj_dim query_dim cross_attention_hidden_size"
    ).split(),
    "INNER": (
        "intermediate_size ffn_dim d_ff mlp_dim encoder_ffn_dim decoder_ffn_dim intermediate_size_mlp "
        "dense_intermediate_size projector_hidden_size projection_hidden_size projection_hidden_dim "
        "projection_intermediate_size projector_intermediate_size alignment_intermediate_size"
    ).split(),
    "EXPERT": (
        "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size "
        "shared_intermediate_size share_expert_dim moe_shared_expert_intermediate_size moe_hidden_size "
        "moe_latent_size"
    ).split(),
    "HEADS": (
        "num_attention_heads num_heads attention_heads encoder_attention_heads decoder_attention_heads n_head "
        "swa_num_attention_heads index_n_heads indexer_n_heads num_sliding_attention_heads d_kv_heads "
        "resampler_n_heads linear_num_heads"
    ).split(),
    "HEAD": (
        "head_dim swa_head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim index_head_dim indexer_head_dim d_kv "
        "linear_head_dim linear_key_head_dim linear_value_head_dim resampler_head_dim attention_head_dim "
        "query_pre_attn_scalar rotary_dim"
    ).split(),
    "LATENT": ("kv_lora_rank q_lora_rank".split()),
    "EXPERTS": "n_routed_experts num_experts num_local_experts moe_num_experts".split(),
    "CHOSEN": "num_experts_per_tok moe_topk top_k_experts moe_k num_experts_per_token".split(),
    "ONE": "n_group topk_group first_k_dense_replace".split(),
    "VOCABULARY": "vocab_size vocab_size_per_layer_input unpadded_vocab_size output_vocab_size".split(),
    "NONE": "num_kv_shared_layers num_nextn_predict_layers num_mtp_layers".split(),
}
_VALUES = {
    "WIDTH": WIDTH,
    "INNER": INNER,
    "EXPERT": WIDTH,
    "HEADS": HEADS,
    "HEAD": HEAD,
    "LATENT": LATENT,
    "EXPERTS": EXPERTS,
    "CHOSEN": 2,
    "ONE": 1,
    "VOCABULARY": VOCABULARY,
    "NONE": 0,
}
_SIZE_OF = {name: _VALUES[kind] for kind, names in _SIZES.items() for name in names}
_PER_GROUP = ("num_key_value_heads", "swa_num_key_value_heads", "indexer_kv_heads", "linear_num_key_heads")
_INDICES = ("indexes", "indices", "idxs", "layer_ids", "cross_attention_layers", "mlp_only_layers", "moe_layers")
_TOKEN = re.compile(r"(?<!layer)_(?:token_)?(?:id|index|ids)$")


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
        self._new: dict[int, int] = {}

    def renamed(self, token: int) -> int:
        if token < FIRST_TEXT:
            return token
        return self._new.setdefault(token, FIRST_SPECIAL + len(self._new))

    def fresh(self) -> int:
        return self.renamed(1 << 40 | len(self._new))


def _part(config: Mapping[str, Any], tokens: _Tokens) -> dict[str, Any]:
    count, kept = _kept_layers(config)
    small: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            is_part = "model_type" in value or name.endswith("_config") or name in ("encoder", "decoder")
            small[name] = _part(value, tokens) if is_part else dict(value)
        elif isinstance(value, (list, tuple)) and len(value) == count and count > 1 and not _is_index(name):
            small[name] = [_entry(name, value[index], config, tokens) for index in kept]
        else:
            small[name] = _entry(name, value, config, tokens)
    for name in ("rope_parameters", "rope_scaling"):
        if small.get(name):
            small[name] = _rope(small[name], _head(config))
    return small


def _kept_layers(config: Mapping[str, Any]) -> tuple[int, list[int]]:
    """The number of layers, and which of them stay: the first of each kind, and at least two."""
    counts = [config[name] for name in _LAYER_COUNTS if isinstance(config.get(name), int)]
    if not counts or counts[0] < 1:
        return 0, []
    count = counts[0]
    lists = [v for v in config.values() if isinstance(v, (list, tuple)) and len(v) == count]
    kinds = {index: tuple(str(each[index]) for each in lists) for index in range(count)}
    first = {kind: index for index, kind in reversed(kinds.items())}
    kept = sorted(first.values())
    kept += [index for index in range(count) if index not in kept][: max(0, LAYERS - len(kept))]
    return count, sorted(kept)


def _is_index(name: str) -> bool:
    return name.endswith(_INDICES)


def _entry(name: str, value: Any, config: Mapping[str, Any], tokens: _Tokens) -> Any:
    """One entry at its new value; what has no rule stays."""
    if name in ("image_token_id", "image_token_index") and value is None:
        return tokens.fresh()
    if value is None or isinstance(value, (bool, str)):
        return value
    if name in _LAYER_COUNTS and isinstance(value, int):
        return len(_kept_layers(config)[1]) if value == _kept_layers(config)[0] else min(value, LAYERS)
    if _is_index(name) and isinstance(value, (list, tuple)):
        return [LAYERS - 1] if value else []
    if name in _PER_GROUP and isinstance(value, int):
        own = config.get(name.replace("key_value", "attention").replace("key_heads", "value_heads"))
        return HEADS if value == own else min(value, GROUPS)
    if name == "linear_num_value_heads":
        return HEADS
    if name == "image_size":
        return _picture_size(value, config.get("patch_size"))
    if name in _SIZE_OF and isinstance(value, int):
        return _SIZE_OF[name] if value > 0 else value
    if _TOKEN.search(name) and "layer" not in name:
        if isinstance(value, int):
            return tokens.renamed(value)
        if isinstance(value, (list, tuple)) and all(isinstance(each, int) for each in value):
            return [tokens.renamed(each) for each in value]
    return list(value) if isinstance(value, tuple) else value


def _picture_size(size: Any, patch: Any) -> Any:
    if isinstance(size, (list, tuple)):
        patches = patch if isinstance(patch, (list, tuple)) else [patch] * len(size)
        return [_picture_size(each, own) for each, own in zip(size, patches, strict=True)]
    if isinstance(patch, (list, tuple)):
        patch = patch[0]
    return PATCHES * patch if isinstance(size, int) and isinstance(patch, int) else size


def _head(config: Mapping[str, Any]) -> int:
    """Width of a head before."""
    own = config.get("head_dim")
    if isinstance(own, int) and own > 0:
        return own
    width, heads = config.get("hidden_size"), config.get("num_attention_heads") or config.get("num_heads")
    return width // heads if isinstance(width, int) and isinstance(heads, int) else HEAD


def _rope(rope: Mapping[str, Any], head: int) -> dict[str, Any]:
    """Rotary positions with as many frequencies as the new heads have, per axis in the old proportion."""
    small = {name: _rope(value, head) if isinstance(value, Mapping) else value for name, value in rope.items()}
    sections = small.get("mrope_section")
    if sections:
        whole = sum(sections) * HEAD // head
        new = [each * HEAD // head for each in sections]
        new[0] += whole - sum(new)
        small["mrope_section"] = new
    return small
