"""The shapes of a model and the sizes of samples, read for a plan (workload.py)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from optimum_sab.calibration.plan.workload import BlockShape, LinearGroup, ModelShape, SampleSizes
from optimum_sab.calibration.samples.forward_inputs import PER_TOKEN, token_count
from optimum_sab.calibration.samples.modality import token_modalities
from optimum_sab.calibration.streams.targets import target_linear
from optimum_sab.core.settings import LayerSettings
from optimum_sab.format.layout import stored_bits_per_weight
from optimum_sab.nn.decoder import foreign_modules
from optimum_sab.nn.selection import Selection

CHOSEN = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")  # what configurations call experts of a token


def model_shape(model: nn.Module, selection: Selection, target_bits: float | None) -> ModelShape:
    """The shapes of a model.

    Args:
        model: dense, experts as linears where the selection names some; may be on meta.
        selection: what will be binarized.
        target_bits: of all binarized linears together; None where their settings decide.
    """
    named = dict(model.named_parameters())  # a tied one once
    share = _expert_share(model, selection)
    width = _width(model, selection)
    blocks = tuple(_block(model, name, selection, (share, width, target_bits)) for name in selection.blocks)
    inside = tuple(f"{name}." for name in selection.blocks)
    outside = sum(each.numel() for name, each in named.items() if not name.startswith(inside))
    head = getattr(model, "get_output_embeddings", lambda: None)()
    weight = getattr(head, "weight", None)
    foreign = foreign_modules(model)
    tower = [m for m in model.modules() if id(m) in foreign]
    return ModelShape(
        blocks,
        outside,
        max(each.numel() for each in named.values()),
        width,
        weight.shape[0] if isinstance(weight, Tensor) else 0,
        sum(m.weight.numel() for m in tower if isinstance(m, nn.Linear)),
        next((m.weight[0].numel() for m in tower if isinstance(m, (nn.Conv2d, nn.Conv3d))), 0),
        target_linear(model, next(iter(selection.settings))).weight.dtype,
    )


def sample_sizes(
    inputs: Sequence[Mapping[str, Any]], unseen: Sequence[Mapping[str, Any]], model: ModelShape, config: Any
) -> SampleSizes:
    """The sizes of samples that were read.

    Args:
        inputs: forward arguments, one dict per sample.
        unseen: of those that the finished model is compared by.
        model: that they are for.
        config: of that model.
    """
    pictures = [each["pixel_values"].numel() for each in inputs if isinstance(each.get("pixel_values"), Tensor)]
    patches = sum(pictures) // model.patch if model.patch else 0
    tokens, judged = tuple(map(token_count, inputs)), _judged(inputs, config)
    return SampleSizes(
        tokens,
        patches,
        True,
        tuple(map(token_count, unseen)),
        len({frozenset(each).difference(PER_TOKEN) for each in inputs}),
        _judged(unseen, config),
        sum(judged) / max(1, sum(tokens)),
        max(judged, default=0),
    )


def _judged(inputs: Sequence[Mapping[str, Any]], config: Any) -> tuple[int, ...]:
    """Of each sample's tokens, those whose predictions are judged."""
    return tuple(int(token_modalities(each, config).judged(token_count(each)).sum()) for each in inputs)


def _block(model: nn.Module, name: str, selection: Selection, about: tuple[float, int, float | None]) -> BlockShape:
    share, width, target_bits = about
    block = model.get_submodule(name)
    own = {each: settings for each, settings in selection.settings.items() if each.startswith(f"{name}.")}
    groups = _groups(model, own, share, width, selection.experts)
    bits = 0.0
    for each, settings in own.items():
        out, inner = _features(model, each)
        bits += out * inner * (target_bits or stored_bits_per_weight(out, inner, settings))
    weights = sum(each.numel() for each in block.parameters())
    spared = sum(group.weights * (1 - group.share) for group in groups)
    return BlockShape(name, weights, round(bits / 8), groups, weights - spared)


def _groups(
    model: nn.Module, own: Mapping[str, LayerSettings], share: float, width: int, experts: Collection[str]
) -> tuple[LinearGroup, ...]:
    """Linears of one module with inputs of one width share it, but for the last where it gives the hidden state."""
    by_parent: dict[tuple[str, int, LayerSettings], list[tuple[str, int]]] = {}
    for name, settings in own.items():
        out, inner = _features(model, name)
        by_parent.setdefault((name.rpartition(".")[0], inner, settings), []).append((name, out))
    found = []
    for (parent, inner, settings), members in by_parent.items():
        expert = any(parent.startswith(f"{each}.") for each in experts) or bool(_numbers_of_experts(parent))
        here = share if expert else 1.0
        together, last = members, None
        if len(members) > 1 and members[-1][1] == width:
            together, last = members[:-1], members[-1]
        for some in (together, [last] if last else []):
            if some:
                outs = [out for _, out in some]
                alone = len(some) == 1 and outs[0] == width and not expert
                found.append(LinearGroup(len(some), sum(outs), inner, settings, here, alone, expert))
    return tuple(found)


def _expert_share(model: nn.Module, selection: Selection) -> float:
    """Of the tokens, that come to an expert on average; 1 where the configuration does not say."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    chosen = next((found for name in CHOSEN if isinstance(found := getattr(text, name, None), int)), None)
    counts = [int(part) + 1 for name in selection.settings for part in _numbers_of_experts(name)]
    return min(1.0, chosen / max(counts)) if chosen and counts else 1.0


def _numbers_of_experts(name: str) -> list[str]:
    parts = name.split(".")
    return [part for before, part in zip(parts, parts[1:], strict=False) if before == "experts" and part.isdigit()]


def _width(model: nn.Module, selection: Selection) -> int:
    """Features of a hidden state: what the first linear that is binarized is given."""
    return _features(model, next(iter(selection.settings)))[1]


def _features(model: nn.Module, name: str) -> tuple[int, int]:
    """Outputs and inputs of a linear."""
    linear = target_linear(model, name)
    return linear.out_features, linear.in_features
