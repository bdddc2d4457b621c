"""Faster training of the example on a CPU; mathematically the model stays what it is.

Three things are slow on a CPU: the gradient of the patch convolution, attention that loops over pictures, and the
many small elementwise passes. The first two have equivalents for pictures of one size; `torch.compile` does the third.
"""

import types

import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionPatchEmbed,
    Qwen2_5_VLVisionAttention,
    apply_rotary_pos_emb_vision,
)


def accelerate(model: Qwen2_5_VLForConditionalGeneration, compiled: bool = True) -> None:
    """Change the model in place for training on pictures of one size; weights and their names stay.

    The forward methods are replaced on this instance only: save the weights, then load them into an ordinary model.

    Args:
        model: the model to change.
        compiled: whether to compile the layers as well, which takes a minute and a C++ compiler.
    """
    model.set_attn_implementation("eager")
    visual = model.model.visual
    visual.patch_embed.forward = types.MethodType(_embed_patches, visual.patch_embed)
    for block in visual.blocks:
        block.attn.forward = types.MethodType(_attend_pictures, block.attn)
    if compiled:
        for layer in (*visual.blocks, *model.model.language_model.layers):
            layer.compile(dynamic=False)


def _embed_patches(self: Qwen2_5_VisionPatchEmbed, patches: Tensor) -> Tensor:
    """The convolution's kernel covers a whole patch, so it is a linear map."""
    return torch.nn.functional.linear(patches, self.proj.weight.view(self.embed_dim, -1), self.proj.bias)


def _attend_pictures(
    self: Qwen2_5_VLVisionAttention,
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    **_: object,
) -> Tensor:
    """Full attention within each picture, all pictures at once; they must have equally many patches."""
    patches, pictures = hidden_states.shape[0], cu_seqlens.shape[0] - 1
    query, key, value = self.qkv(hidden_states).reshape(patches, 3, self.num_heads, -1).unbind(1)
    query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)
    query, key, value = (
        each.reshape(pictures, patches // pictures, self.num_heads, -1).transpose(1, 2) for each in (query, key, value)
    )
    weights = (query @ key.transpose(2, 3) * self.scaling).softmax(-1, dtype=torch.float32).to(value.dtype)
    return self.proj((weights @ value).transpose(1, 2).reshape(patches, -1))
