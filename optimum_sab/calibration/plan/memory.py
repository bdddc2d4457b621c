"""What a run holds at once, phase by phase: arithmetic from shapes, nothing is measured here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from optimum_sab.calibration.plan.holdings import (
    COMPARED,
    Part,
    activations_part,
    copied_block,
    few_tokens,
    graph_bytes,
    sensitivity_bytes,
    slack_of,
    statistics_part,
    tempered_tokens,
    training_bytes,
)
from optimum_sab.calibration.plan.workload import Workload
from optimum_sab.calibration.predictions.scaled import KEPT_BYTES
from optimum_sab.calibration.predictions.temperature import CHUNK
from optimum_sab.calibration.stages.head import TEMPERATURE_SAMPLES
from optimum_sab.wording import size_in_words

MACHINE, ACCELERATOR = "the machine's memory", "the accelerator's memory"
LARGEST = 3  # parts of a phase that a message names


@dataclass(frozen=True)
class Phase:
    """What is held at once in one part of the run.

    Attributes:
        name: as stages are named.
        parts: that add up to it.
    """

    name: str
    parts: tuple[Part, ...]

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    @property
    def certain(self) -> int:
        return sum(part.certain for part in self.parts)

    @property
    def mapped(self) -> int:
        return sum(part.mapped for part in self.parts)

    @property
    def own(self) -> int:
        """Without what is mapped from the checkpoint's files."""
        return self.bytes - self.mapped

    def largest(self, size: Callable[[Part], int]) -> str:
        """The parts that take the most, in words.

        Args:
            size: bytes of a part that count.
        """
        parts = sorted((part for part in self.parts if size(part)), key=size, reverse=True)[:LARGEST]
        return ", ".join(f"{size_in_words(size(part))} {part.name}" for part in parts)


@dataclass(frozen=True)
class DeviceMemory:
    """What is held on one device.

    Attributes:
        device: `MACHINE` or `ACCELERATOR`.
        phases: in order.
    """

    device: str
    phases: tuple[Phase, ...]

    @property
    def peak(self) -> Phase:
        """The phase that takes the most."""
        return max(self.phases, key=lambda phase: phase.bytes)

    @property
    def certain(self) -> Phase:
        """The phase of which the most is certain."""
        return max(self.phases, key=lambda phase: phase.certain)

    @property
    def own(self) -> int:
        """The most of all phases, without what is mapped from the checkpoint's files."""
        return max(phase.own for phase in self.phases)


def memory_of(work: Workload, process: int = 0) -> tuple[DeviceMemory, ...]:
    """What a run holds, on the machine and on the accelerator where one works.

    Args:
        work: the run.
        process: bytes of the process before there is a model, libraries and samples.
    """
    if work.home != "cpu":  # all of it is there
        return (DeviceMemory(ACCELERATOR, tuple(_phases(work, 0, work.home))),)
    machine = DeviceMemory(MACHINE, tuple(_phases(work, process, "cpu")))
    if work.worker == "cpu":
        return (machine,)
    return (machine, DeviceMemory(ACCELERATOR, tuple(_worker_phases(work))))


def _phases(work: Workload, process: int, device: str) -> Iterator[Phase]:
    """Of the device that the model is loaded to."""
    model, options = work.model, work.options
    copied = model.copied if device == "cpu" and not work.streamed else 1.0
    mapped = copied < 0.5
    here = work.worker == device
    base = [] if not process else [Part("the process and its samples", process)]
    outside = model.outside * model.item
    if work.streamed:  # in scratch files
        base.append(Part("weights outside of the blocks, in use", model.in_use_outside))
    else:
        base.append(_weights("weights outside of the blocks", outside, copied, device))
    dense = _weights("dense blocks", model.block_bytes, copied, device)
    block = Part("one dense block", model.largest_block, model.largest_block)
    slack = slack_of(work)
    during = block if work.streamed else dense
    checking = Part("checking the largest tensor", 2 * model.largest * model.item)
    yield Phase("rehearsal", (*base, during, checking))
    if options.allocation is not None:
        graph = Part("gradients of the sensitivities", sensitivity_bytes(work, here))
        yield Phase("sensitivities", (*base, during, *([] if here else [copied_block(work)]), graph, slack))
        parts = [activations_part(work, few_tokens(work), 1, here), *([statistics_part(work)] if here else [])]
        yield Phase("allocation", (*base, during, *parts, slack))
    packed = Part("packed blocks", model.packed_bytes, model.packed_bytes)
    largest = max(each.packed_bytes for each in model.blocks)
    left = _weights("dense in packed blocks", model.left_bytes, copied, device)
    if work.streamed:  # finished blocks are in scratch files, but for the one that is called
        packed = Part("a packed block", largest)
        left = Part("dense in it", max(each.weights - each.binarized for each in model.blocks) * model.item)
    solving = [activations_part(work, work.samples.total, 1 + work.two_streams, here)]
    slack = slack_of(work, solving[0].bytes)  # from here on
    solving += [statistics_part(work)] if here else []
    if options.refine is not None and options.refine.epochs and here:
        solving.append(Part("training a block", training_bytes(work, 1)))
    if work.streamed:  # what is outside has been given back
        yield Phase("blocks", (*base[:-1], block, packed, left, *solving, slack))
    else:  # what is packed takes the place of what was dense; maps stay as long as any tensor of the file is there
        so_far = packed.bytes if mapped else largest
        yield Phase("blocks", (*base, dense, Part("packed blocks", so_far), *solving, slack))
    done = [*base, replace(dense, certain=left.certain) if mapped else left, packed]
    if options.temperature_scaling and work.two_streams and model.vocabulary:
        judged = tempered_tokens(work)
        logits = judged * model.vocabulary * 4
        kept = min(logits, KEPT_BYTES)
        chunk = 4 * min(CHUNK, judged) * model.vocabulary * 4
        states = 2 * sum(work.samples.spread(TEMPERATURE_SAMPLES)) * model.width * model.item
        parts = [Part("hidden states at the head", states), Part("logits", kept + chunk)]
        yield Phase("temperature", (*done, *parts, slack))
    if options.tuned:
        teacher = work.samples.total * model.width * model.item
        given = Part("hidden states at the head", teacher, teacher if work.samples.exact else 0)
        step = Part("a step of training", training_bytes(work, len(model.blocks)))
        yield Phase("tuning", (*done, given, step, slack))
    if model.vocabulary and work.samples.unseen:
        logits = COMPARED * max(work.samples.judged or work.samples.unseen) * model.vocabulary * model.item
        yield Phase("comparison", (*done, Part("logits", logits), slack))


def _weights(name: str, size: int, copied: float, device: str) -> Part:
    """Weights of which a share is copied; on the machine the rest is mapped from files."""
    own = round(copied * size)
    return Part(name, size, own, size - own if device == "cpu" else 0)


def _worker_phases(work: Workload) -> Iterator[Phase]:
    """Of an accelerator that blocks are brought to."""
    model, options = work.model, work.options
    block = Part("one dense block", model.largest_block, model.largest_block)
    if options.allocation is not None:
        graph = Part("gradients of the sensitivities", work.samples.longest * graph_bytes(work))
        yield Phase("sensitivities", (block, graph))
        few = activations_part(work, few_tokens(work), 1, True, bounded=False)
        yield Phase("allocation", (block, few, statistics_part(work)))
    parts = [
        activations_part(work, work.samples.total, 1 + work.two_streams, True, bounded=False),
        statistics_part(work),
    ]
    if options.refine is not None and options.refine.epochs:
        parts.append(Part("training a block", training_bytes(work, 1)))
    yield Phase("blocks", (block, *parts))
    if options.tuned:
        head = Part("the output embedding", model.vocabulary * model.width * model.item)
        yield Phase("tuning", (block, head, Part("a step of training", training_bytes(work, len(model.blocks)))))
