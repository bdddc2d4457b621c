"""Which part of a language model's matrices is binarized, found without asking the code that binarizes.

A matrix of the language model is the weight of a linear, or a stack of experts, that lies in a list of blocks and in no
part that reads pictures or sound.
"""

from __future__ import annotations

import re
from math import prod

import torch
from torch import nn

from optimum_sab.nn.linear import SABLinear

_ELSEWHERE = re.compile(
    r"(^|[._])(vision|visual|image|img|video|vit|sam|siglip|clip|audio|speech|sound|qformer|perceiver|resampler|"
    r"\w*projectors?|projection|connector|aligner|merger|adapter|vq|vqmodel|vqgan|protein|abstractor|depth_decoder|"
    r"code_predictor|talker|high_res|multi_modal\w*|embed_\w+)([._]|$)"
)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)


def language_matrices(model: nn.Module, language: str | None = None) -> dict[str, torch.Size]:
    """Shapes of the language model's matrices by parameter name.

    Args:
        model: dense.
        language: expression that the names of the language model's modules begin with, where their place does not
            show in their names.
    """
    return {
        f"{name}.{key}" if name else key: parameter.shape
        for name, module in model.named_modules()
        if _is_language(name, language) and not isinstance(module, _CONVOLUTIONS)
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.is_floating_point() and _is_matrix(module, key, parameter)
    }


def binarized_share(model: nn.Module, matrices: dict[str, torch.Size]) -> float:
    """The part of these matrices' entries that a binarized model no longer holds as numbers.

    Args:
        model: binarized.
        matrices: of the same model when it was dense.
    """
    packed = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, SABLinear)}
    dense = {
        name
        for name, parameter in model.named_parameters()
        if name not in packed and parameter.is_floating_point() and parameter.shape == matrices.get(name)
    }
    whole = sum(prod(shape) for shape in matrices.values())
    return sum(prod(shape) for name, shape in matrices.items() if name not in dense) / whole if whole else 0.0


def _is_language(name: str, language: str | None) -> bool:
    if not any(part.isdigit() for part in name.split(".")):
        return False
    return re.match(language, name) is not None if language else not _ELSEWHERE.search(name)


def _is_matrix(module: nn.Module, key: str, parameter: torch.Tensor) -> bool:
    if parameter.dim() == 2:
        return key == "weight" and isinstance(getattr(module, "in_features", None), int)
    return parameter.dim() == 3 and min(parameter.shape) > 1
