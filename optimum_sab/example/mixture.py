"""The embedded example as a mixture of experts: a Qwen3-VL-MoE that answers the same questions.

It begins from the trained example (sparse upcycling): what has the same name and shape is taken over, and an expert
begins as half of the neurons of the example's MLP. It then goes through the example's own training, vision first
(`python -m optimum_sab.example.training --mixture --output DIR`). Needs Transformers 5.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import load_balancing_loss_func

from optimum_sab.example import MARK, architecture, checkpoint_path
from optimum_sab.example.tasks import IMAGE_SIZE

EXPERTS, CHOSEN = 8, 2
BALANCE_WEIGHT = 0.01


def mixture_config() -> dict[str, Any]:
    """The mixture's config.json.

    The matrices of an expert are not square: Transformers could not tell which of its two layouts one is stored in.
    """
    example: dict[str, Any] = architecture.model_config()
    text, vision = dict(example["text_config"]), dict(example["vision_config"])
    for name in ("rope_scaling", "use_sliding_window"):
        del text[name]
    for name in ("tokens_per_second", "window_size", "fullatt_block_indexes"):
        del vision[name]
    return {
        **example,
        "architectures": [Qwen3VLMoeForConditionalGeneration.__name__],
        "model_type": "qwen3_vl_moe",
        MARK: True,
        "text_config": {
            **text,
            "model_type": "qwen3_vl_moe_text",
            "head_dim": text["hidden_size"] // text["num_attention_heads"],
            "moe_intermediate_size": text["intermediate_size"] // 2,
            "num_experts": EXPERTS,
            "num_experts_per_tok": CHOSEN,
            "decoder_sparse_step": 1,
            "norm_topk_prob": True,
            "rope_scaling": {"rope_type": "default", "mrope_section": [6, 5, 5], "mrope_interleaved": True},
        },
        "vision_config": {
            **vision,
            "model_type": "qwen3_vl_moe",
            "hidden_act": "gelu_pytorch_tanh",
            "num_position_embeddings": (IMAGE_SIZE // vision["patch_size"]) ** 2,
            "deepstack_visual_indexes": [1, 2],
        },
    }


def build_mixture() -> Qwen3VLMoeForConditionalGeneration:
    """The mixture as the trained example leaves it, in float32; the rest depends on torch's seed.

    Every two experts begin as the two halves of the example's MLP, and DeepStack by adding nothing to the decoder.
    """
    config = Qwen3VLMoeConfig(**mixture_config())
    architecture.in_float32(config)
    model = Qwen3VLMoeForConditionalGeneration(config).float()
    example = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint_path(), dtype=torch.float32)
    own, known = model.state_dict(), example.state_dict()
    model.load_state_dict({name: known.get(name, own[name]) if _fits(known, own, name) else own[name] for name in own})
    with torch.no_grad():
        for merger in model.model.visual.deepstack_merger_list:
            merger.linear_fc2.weight.zero_()
        for layer, dense in zip(model.model.language_model.layers, example.model.language_model.layers, strict=True):
            _split(layer.mlp.experts, dense.mlp)
    return model


def _fits(known: dict[str, Tensor], own: dict[str, Tensor], name: str) -> bool:
    return name in known and known[name].shape == own[name].shape


def _split(experts: Any, dense: Any) -> None:
    """Give every two experts the neurons of a dense MLP, to one half and half drawn anew for each two.

    Two experts count half each, so an expert's output is doubled.
    """
    width = dense.gate_proj.out_features
    for expert in range(0, EXPERTS, 2):
        for index, neurons in enumerate(torch.randperm(width).view(2, -1)):
            both = torch.cat([dense.gate_proj.weight[neurons], dense.up_proj.weight[neurons]])
            experts.gate_up_proj[expert + index] = both
            experts.down_proj[expert + index] = 2 * dense.down_proj.weight[:, neurons]


def imbalance(router_logits: tuple[Tensor, ...], attention_mask: Tensor) -> Tensor:
    """How unevenly the tokens of a batch are spread over the experts, the mean over layers.

    The loss of Switch Transformers, eq. 4 to 6: as much as a token has experts where they are spread evenly.

    Args:
        router_logits: of every layer, [batch · length, experts].
        attention_mask: 1 for a token and 0 for padding, [batch, length].
    """
    each = [load_balancing_loss_func((logits,), EXPERTS, CHOSEN, attention_mask) for logits in router_logits]
    return torch.stack(each).mean()
