"""The vision tower's shape and its first weights.

A transformer that starts from noise needs many epochs to find out that neighbouring patches belong together. Here the
first layers start as convolutions instead: head number h of a layer attends to the patch at the h-th of eight
neighbouring offsets, the residual path being the ninth tap. The positions are written as sines and cosines, so that an
offset is a rotation and the attention's logit is a sum of cosines with its peak at the neighbour:

    logit(p, q) ∝ Σ_k cos(ω_k (p_x + δ_x − q_x)) + cos(ω_k (p_y + δ_y − q_y)).

Training is free to leave that start.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

if TYPE_CHECKING:
    from jaxtyping import Float

IMAGE_SIZE = 64
PATCH_SIZE = 8
GRID = IMAGE_SIZE // PATCH_SIZE
TOKENS = GRID * GRID
WIDTH = 192
HEADS = 8
LAYERS = 6
NEIGHBOUR_LAYERS = 4
OFFSETS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))
FREQUENCIES = 6
SHARPNESS = 0.5


def tower_config() -> SiglipVisionConfig:
    """Six layers of width 192 on 8x8 patches of 64x64 pixels: 2.3 million parameters."""
    return SiglipVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        vision_use_head=False,
    )


@torch.no_grad()
def initialize_tower(tower: SiglipVisionModel, patches: Float[Tensor, "count pixels"]) -> None:
    """Set the first weights: whitened patches, positions as waves, attention to neighbours.

    Args:
        tower: the tower to start, as `tower_config` shapes it.
        patches: float32, example patches as the patch convolution sees them, flattened.
    """
    embeddings, layers = tower.embeddings, tower.encoder.layers
    whitening = _whitening(patches)
    embeddings.patch_embedding.weight.copy_(whitening.reshape(embeddings.patch_embedding.weight.shape))
    embeddings.patch_embedding.bias.copy_(-whitening @ patches.mean(0))
    axis = torch.arange(GRID, dtype=torch.float32)
    row, column = axis.repeat_interleave(GRID), axis.repeat(GRID)
    waves = torch.cat([_waves(row), _waves(column)], dim=1)  # [64, 24]
    basis = torch.linalg.qr(torch.randn(WIDTH, waves.shape[1]))[0]
    embeddings.position_embedding.weight.copy_(waves @ basis.T * math.sqrt(WIDTH / waves.shape[1]))
    for layer in layers:
        for linear in (layer.self_attn.v_proj, layer.self_attn.out_proj, layer.mlp.fc1, layer.mlp.fc2):
            nn.init.orthogonal_(linear.weight)
            nn.init.zeros_(linear.bias)
        layer.self_attn.out_proj.weight.mul_(0.5)
        layer.mlp.fc2.weight.mul_(0.5)
    for layer in layers[:NEIGHBOUR_LAYERS]:
        queries = [_shift(*offset) @ basis.T for offset in OFFSETS]
        layer.self_attn.q_proj.weight.copy_(torch.cat(queries) * SHARPNESS)
        layer.self_attn.k_proj.weight.copy_(torch.cat([basis.T] * HEADS) * SHARPNESS)
        nn.init.zeros_(layer.self_attn.q_proj.bias)
        nn.init.zeros_(layer.self_attn.k_proj.bias)


def _omega() -> Tensor:
    return 2 * math.pi * torch.arange(1, FREQUENCIES + 1) / (2 * GRID)


def _waves(place: Tensor) -> Tensor:
    angles = place[:, None] * _omega()
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _shift(rows: int, columns: int) -> Tensor:
    """The rotation that takes the waves of a place to those of the place moved by an offset, [24, 24]."""
    blocks = []
    for offset in (rows, columns):
        cosine, sine = torch.diag((offset * _omega()).cos()), torch.diag((offset * _omega()).sin())
        blocks.append(torch.cat([torch.cat([cosine, -sine], 1), torch.cat([sine, cosine], 1)], 0))
    return torch.block_diag(*blocks)


def _whitening(patches: Tensor) -> Tensor:
    """A random rotation of decorrelated patches with entries of about unit size, [width, pixels]."""
    centred = patches - patches.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(patches))
    values, vectors = values.flip(0)[:WIDTH].clamp_min(0), vectors.flip(1)[:, :WIDTH]
    scale = (values + 0.01 * values.mean()).rsqrt()
    rotation = torch.linalg.qr(torch.randn(WIDTH, scale.numel()))[0]
    return 0.5 * rotation @ (scale[:, None] * vectors.T)
