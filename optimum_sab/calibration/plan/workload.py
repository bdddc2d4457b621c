"""What the work of a run follows from: shapes of the model, sizes of the samples, and what is asked for.

How a model and samples are read for them is in `shapes`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from optimum_sab.calibration.options import RunOptions
from optimum_sab.core.settings import LayerSettings


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
        judged: of the tokens of each in ``unseen``, those whose predictions are compared; empty for all.
        judged_share: of the calibration samples' tokens, those whose predictions are judged.
        most_judged: of the tokens of one calibration sample; 0 where it is not known, and all may be.
    """

    tokens: tuple[int, ...]
    patches: int = 0
    exact: bool = True
    unseen: tuple[int, ...] = ()
    kinds: int = 1
    judged: tuple[int, ...] = ()
    judged_share: float = 1.0
    most_judged: int = 0

    @property
    def total(self) -> int:
        return sum(self.tokens)

    @property
    def longest(self) -> int:
        return max(self.tokens)

    @property
    def most_logits(self) -> int:
        """Tokens of one calibration sample, at most, that logits are made of."""
        return min(self.most_judged or self.longest, self.longest)

    def share(self, size: int) -> SampleSizes:
        """About what one of ``size`` processes has of them; the shortest, since none has less."""
        tokens = tuple(sorted(self.tokens))[: max(1, len(self.tokens) // size)]
        return replace(self, tokens=tokens, patches=self.patches // size)

    def largest_share(self, size: int) -> SampleSizes:
        """About what the process has that has most of them: its part of the tokens, the longest samples first."""
        tokens: list[int] = []
        held, even = 0, -(-self.total // size)
        for each in sorted(self.tokens, reverse=True):
            if held + each <= even or not tokens:
                tokens.append(each)
                held += each
        return replace(self, tokens=tuple(tokens), patches=-(-self.patches // size))

    def first(self, count: int, mixed: int = 0) -> SampleSizes:
        """Of so many samples at most, as `calibration_samples` takes them: the first, and the last ``mixed``."""
        behind = len(self.tokens) - min(mixed, len(self.tokens))
        tokens = self.tokens[:behind][: max(0, count - mixed)] + self.tokens[behind:]
        return replace(self, tokens=tokens, patches=self.patches * len(tokens) // len(self.tokens))

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
        main: the device that the model is loaded to, the first of several.
        spread: whether it may be loaded to several.
        streamable: whether its blocks' weights could stay in their files.
        ranks: processes that share the run.
    """

    model: ModelShape
    samples: SampleSizes
    options: RunOptions
    two_streams: bool
    streamed: bool = False
    main: torch.device = field(default_factory=lambda: torch.device("cpu"))
    spread: bool = False
    streamable: bool = True
    ranks: int = 1

    @property
    def home(self) -> str:
        """Kind of the device that the model is loaded to, "cpu", "cuda" and the like."""
        return self.main.type

    @property
    def worker(self) -> str:
        """Where blocks are worked on."""
        return self.home if self.options.device is None else self.options.device.type
