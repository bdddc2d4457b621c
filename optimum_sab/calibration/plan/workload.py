"""What the work of a run follows from: shapes of the model, sizes of the samples, and what is asked for."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from optimum_sab.calibration.options import RunOptions
from optimum_sab.calibration.samples.forward_inputs import PER_TOKEN, token_count
from optimum_sab.calibration.streams.targets import target_linear
from optimum_sab.core.settings import LayerSettings
from optimum_sab.format.layout import stored_bits_per_weight
from optimum_sab.nn.decoder import foreign_modules
from optimum_sab.nn.selection import Selection

CHOSEN = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")  # what configurations call experts of a token


@dataclass(frozen=True)
class LinearGroup:
    """Linears that are taken to share their input, and to be solved as one stack.

    Attributes:
        members: how many.
        out_features: of all of them together.
        in_features: of their input.
        settings: of the first.
        share: of the tokens, that comes here: 1, or an expert's.
        at_residual: it is one linear, whose output is added to the hidden state.
        expert: it is solved beside others of its shape.
    """

    members: int
    out_features: int
    in_features: int
    settings: LayerSettings
    share: float = 1.0
    at_residual: bool = False
    expert: bool = False

    @property
    def weights(self) -> int:
        return self.out_features * self.in_features


@dataclass(frozen=True)
class BlockShape:
    """One decoder block.

    Attributes:
        name: dotted.
        weights: parameters, all of them.
        packed_bytes: that its binarized linears will take.
        groups: of the linears that are binarized.
        computed: weights that a token is multiplied with, those of experts by their share.
    """

    name: str
    weights: int
    packed_bytes: int
    groups: tuple[LinearGroup, ...]
    computed: float

    @property
    def binarized(self) -> int:
        return sum(group.weights for group in self.groups)


@dataclass(frozen=True)
class ModelShape:
    """A dense model.

    Attributes:
        blocks: of the decoder, all of them.
        outside: parameters outside of the blocks, a tied one once.
        largest: parameters of its largest tensor.
        width: of a hidden state.
        vocabulary: rows of the output embedding; 0 without one.
        tower: weights that a patch of a picture is multiplied with.
        patch: numbers in a patch; 0 where the model reads no pictures.
        dtype: of the weights in memory.
        copied: share of the weights that is copied into memory when it is loaded: stored in another dtype, or experts
            that are merged. The rest stays in its files as memory maps, which the system can let go of.
    """

    blocks: tuple[BlockShape, ...]
    outside: int
    largest: int
    width: int
    vocabulary: int
    tower: int
    patch: int
    dtype: torch.dtype
    copied: float = 0.0

    @property
    def mapped(self) -> bool:
        """Whether most of it is mapped."""
        return self.copied < 0.5

    @property
    def item(self) -> int:
        """Bytes of a weight."""
        return self.dtype.itemsize

    @property
    def block_bytes(self) -> int:
        """Of all blocks, dense."""
        return sum(block.weights for block in self.blocks) * self.item

    @property
    def largest_block(self) -> int:
        """Bytes of the largest block, dense."""
        return max(block.weights for block in self.blocks) * self.item

    @property
    def packed_bytes(self) -> int:
        """Of all binarized linears."""
        return sum(block.packed_bytes for block in self.blocks)

    @property
    def left_bytes(self) -> int:
        """Of what stays dense in the blocks."""
        return sum(block.weights - block.binarized for block in self.blocks) * self.item

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        return tuple(group for block in self.blocks for group in block.groups)

    @property
    def in_use_outside(self) -> int:
        """Bytes of the larger of what is used at once outside of the blocks: the tower, or the output embedding."""
        return min(self.outside, max(self.tower, self.vocabulary * self.width, self.largest)) * self.item


@dataclass(frozen=True)
class SampleSizes:
    """How much goes through the model.

    Attributes:
        tokens: of each calibration sample.
        patches: of pictures, in all of them.
        exact: whether the samples were read; else ``tokens`` is the most that the settings allow.
        unseen: tokens of each sample that the finished model is compared by.
        kinds: of samples, that differ in what they hold: text alone, with pictures.
    """

    tokens: tuple[int, ...]
    patches: int = 0
    exact: bool = True
    unseen: tuple[int, ...] = ()
    kinds: int = 1

    @property
    def total(self) -> int:
        return sum(self.tokens)

    @property
    def longest(self) -> int:
        return max(self.tokens)

    def share(self, size: int) -> SampleSizes:
        """About what one of ``size`` processes has of them; the shortest, since none has less."""
        tokens = tuple(sorted(self.tokens))[: max(1, len(self.tokens) // size)]
        return replace(self, tokens=tokens, patches=self.patches // size)

    def spread(self, count: int) -> tuple[int, ...]:
        """Of at most so many samples, evenly spread."""
        step = max(1, len(self.tokens) / count)
        return tuple(self.tokens[int(i * step)] for i in range(min(count, len(self.tokens))))


@dataclass(frozen=True)
class Workload:
    """All of it.

    Attributes:
        model: dense.
        samples: that calibrate.
        options: what is asked for.
        two_streams: whether a dense stream runs beside the quantized one.
        streamed: whether the blocks' weights stay in their files.
        home: kind of the device that the model is loaded to, "cpu", "cuda" and the like.
        spread: whether it may be loaded to several.
    """

    model: ModelShape
    samples: SampleSizes
    options: RunOptions
    two_streams: bool
    streamed: bool = False
    home: str = "cpu"
    spread: bool = False

    @property
    def worker(self) -> str:
        """Where blocks are worked on."""
        return self.home if self.options.device is None else self.options.device.type


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
    inputs: Sequence[Mapping[str, Any]], unseen: Sequence[Mapping[str, Any]], model: ModelShape
) -> SampleSizes:
    """The sizes of samples that were read.

    Args:
        inputs: forward arguments, one dict per sample.
        unseen: of those that the finished model is compared by.
        model: that they are for.
    """
    pictures = [each["pixel_values"].numel() for each in inputs if isinstance(each.get("pixel_values"), Tensor)]
    patches = sum(pictures) // model.patch if model.patch else 0
    return SampleSizes(
        tuple(map(token_count, inputs)),
        patches,
        True,
        tuple(map(token_count, unseen)),
        len({frozenset(each).difference(PER_TOKEN) for each in inputs}),
    )


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
        expert = any(parent.startswith(f"{each}.") for each in experts) or _numbered_expert(parent)
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


def _numbered_expert(parent: str) -> bool:
    parts = parent.split(".")
    return any(part.isdigit() and before == "experts" for before, part in zip(parts, parts[1:], strict=False))


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
