"""A random picture as the arguments of a model's forward, in the layout that their names tell."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch

from optimum_sab.bench.coverage.shrinking import PATCHES
from optimum_sab.bench.coverage.values import Draw

_PARTS = ("vision_config", "vq_config")
_AROUND = ("encoder", "vlm_config")


def picture_arguments(config: Any, names: Set[str], draw: Draw) -> dict[str, Any]:
    """The arguments that hold one picture.

    Args:
        config: of the model.
        names: of the arguments that its forward takes.
        draw: where random numbers come from.
    """
    vision = _vision(config)
    patch, channels = _first(getattr(vision, "patch_size", 8)), _channels(vision)
    patches = PATCHES * PATCHES
    if "image_grid_thw" in names:
        frames = getattr(vision, "temporal_patch_size", None) or getattr(vision, "patch_temporal", None) or 1
        grid = {"image_grid_thw": torch.tensor([[1, PATCHES, PATCHES]])}
        if "image_merge_sizes" in names:
            grid["image_merge_sizes"] = torch.tensor([2])
        return {"pixel_values": draw.pixels(patches, channels * _first(frames) * patch * patch), **grid}
    if "image_grid_hw" in names:
        grid = {"image_grid_hw": torch.tensor([[PATCHES, PATCHES]])}
        return {"pixel_values": draw.pixels(patches, channels * patch * patch), **grid}
    if "spatial_shapes" in names:
        return {
            "pixel_values": draw.pixels(1, patches, channels * patch * patch),
            "spatial_shapes": torch.tensor([[PATCHES, PATCHES]]),
            "pixel_attention_mask": torch.ones(1, patches, dtype=torch.int64),
        }
    if "target_sizes" in names:
        return {
            "pixel_values": draw.pixels(1, channels, patch, patch * patches),
            "target_sizes": torch.tensor([[PATCHES, PATCHES]]),
        }
    if "image_position_ids" in names:
        side = 2 * getattr(vision, "pooling_kernel_size", 1)
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        return {
            "pixel_values": draw.pixels(1, side * side, channels * patch * patch),
            "image_position_ids": torch.stack((columns.flatten(), rows.flatten()), dim=-1)[None],
        }
    height, width = _picture_size(vision, patch)
    if "pixel_attention_mask" in names:
        return {"pixel_values": draw.pixels(1, 1, channels, height, width)}
    sizes = {"image_sizes": torch.tensor([[height, width]])} if "image_sizes" in names else {}
    return {"pixel_values": draw.pixels(1, channels, height, width), **sizes}


def _vision(config: Any) -> Any:
    """The part of the configuration that describes the picture's encoder; the whole where it is no part."""
    around = [config, *(getattr(config, name, None) for name in _AROUND)]
    found = (getattr(each, part, None) for each in around for part in _PARTS)
    return next((part for part in found if part is not None), config)


def _channels(vision: Any) -> int:
    found = (getattr(vision, name, None) for name in ("in_channels", "num_channels"))
    return next((each for each in found if isinstance(each, int)), 3)


def _picture_size(vision: Any, patch: int) -> tuple[int, int]:
    size = getattr(vision, "image_size", None) or getattr(vision, "resolution", None) or PATCHES * patch
    return (size[0], size[1]) if isinstance(size, (list, tuple)) else (size, size)


def _first(value: Any) -> int:
    return value[0] if isinstance(value, (list, tuple)) else value
