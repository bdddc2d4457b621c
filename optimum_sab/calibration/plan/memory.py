"""What a run holds at once, phase by phase and part by part: arithmetic from shapes, nothing is measured here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from optimum_sab.calibration.plan.workload import LinearGroup, Workload
from optimum_sab.calibration.predictions.scaled import KEPT_BYTES
from optimum_sab.calibration.predictions.temperature import CHUNK, TOKENS
from optimum_sab.calibration.refine.tuning import BATCH
from optimum_sab.calibration.stages.allocation import SAMPLES
from optimum_sab.calibration.stages.head import TEMPERATURE_SAMPLES
from optimum_sab.calibration.streams.memory import activation_bytes, matrices

LEAST_MATRICES = 3  # of those [in, in]: a Hessian, damped, and the factor of its inverse
WEIGHT_COPIES = 4  # fp32 arrays of a weight's shape while it is solved: W, target, pull, what is left
LEAST_COPIES = 2
LOGITS = 8  # arrays of the logits' size while predictions are compared or differentiated
EXPERTS_WAITING = 2**30  # bytes of statistics that wait to be solved together (blocks/experts.py)
ALLOCATOR = 200 * 2**20  # what earlier stages leave behind in the process when they let go of small pieces, at the most
SCATTERED = 0.2  # of the activations, that lies between them unused: measured with the embedded example

MACHINE, ACCELERATOR = "the machine's memory", "the accelerator's memory"


@dataclass(frozen=True)
class Part:
    """Something that takes memory.

    Attributes:
        name: what it is.
        bytes: expected.
        certain: of these, that no way of computing can do without; 0 where the system may drop or spare it.
    """

    name: str
    bytes: int
    certain: int = 0


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
        base.append(Part("weights outside of the blocks", outside, round(copied * outside)))
    dense = Part("dense blocks", model.block_bytes, round(copied * model.block_bytes))
    block = Part("one dense block", model.largest_block, model.largest_block)
    slack = _slack(work)
    during = block if work.streamed else dense
    checking = Part("checking the largest tensor", 2 * model.largest * model.item)
    yield Phase("rehearsal", (*base, during, checking))
    if options.allocation is not None:
        graph = Part("gradients of the sensitivities", _sensitivity_bytes(work))
        yield Phase("sensitivities", (*base, during, *([] if here else [_copied_block(work)]), graph, slack))
        few = sum(work.samples.spread(SAMPLES))
        parts = [_activations(work, few, 1, here), *([_statistics(work)] if here else [])]
        yield Phase("allocation", (*base, during, *parts, slack))
    packed = Part("packed blocks", model.packed_bytes, model.packed_bytes)
    largest = max(each.packed_bytes for each in model.blocks)
    left = Part("dense in packed blocks", model.left_bytes, round(copied * model.left_bytes))
    if work.streamed:  # finished blocks are in scratch files, but for the one that is called
        packed = Part("a packed block", largest)
        left = Part("dense in it", max(each.weights - each.binarized for each in model.blocks) * model.item)
    solving = [_activations(work, work.samples.total, 1 + work.two_streams, here)]
    slack = _slack(work, solving[0].bytes)  # from here on
    solving += [_statistics(work)] if here else []
    if options.refine is not None and options.refine.epochs and here:
        solving.append(Part("training a block", _training_bytes(work, 1)))
    if work.streamed:  # what is outside has been given back
        yield Phase("blocks", (*base[:-1], block, packed, left, *solving, slack))
    else:  # what is packed takes the place of what was dense; maps stay as long as any tensor of the file is there
        so_far = packed.bytes if mapped else largest
        yield Phase("blocks", (*base, dense, Part("packed blocks", so_far), *solving, slack))
    done = [*base, replace(dense, certain=left.certain) if mapped else left, packed]
    kept = 0
    if options.temperature_scaling and work.two_streams and model.vocabulary:
        judged = min(TOKENS, sum(work.samples.spread(TEMPERATURE_SAMPLES)))
        logits = judged * model.vocabulary * 4
        kept = min(logits, KEPT_BYTES)
        chunk = 4 * min(CHUNK, judged) * model.vocabulary * 4
        states = 2 * sum(work.samples.spread(TEMPERATURE_SAMPLES)) * model.width * model.item
        parts = [Part("hidden states at the head", states), Part("logits", kept + chunk)]
        yield Phase("temperature", (*done, *parts, slack))
    if options.tuned:
        teacher = work.samples.total * model.width * model.item
        given = Part("hidden states at the head", teacher, teacher if work.samples.exact else 0)
        step = Part("a step of training", _training_bytes(work, len(model.blocks)))
        yield Phase("tuning", (*done, given, step, slack))
    if model.vocabulary and work.samples.unseen:
        logits = LOGITS * max(work.samples.unseen) * model.vocabulary * 4
        yield Phase("comparison", (*done, Part("logits", logits + kept), slack))


def _worker_phases(work: Workload) -> Iterator[Phase]:
    """Of an accelerator that blocks are brought to."""
    model, options = work.model, work.options
    block = Part("one dense block", model.largest_block, model.largest_block)
    if options.allocation is not None:
        graph = Part("gradients of the sensitivities", work.samples.longest * _graph_bytes(work))
        yield Phase("sensitivities", (block, graph))
        few = sum(work.samples.spread(SAMPLES))
        yield Phase("allocation", (block, _activations(work, few, 1, True, bounded=False), _statistics(work)))
    parts = [_activations(work, work.samples.total, 1 + work.two_streams, True, bounded=False), _statistics(work)]
    if options.refine is not None and options.refine.epochs:
        parts.append(Part("training a block", _training_bytes(work, 1)))
    yield Phase("blocks", (block, *parts))
    if options.tuned:
        head = Part("the output embedding", model.vocabulary * model.width * model.item)
        yield Phase("tuning", (block, head, Part("a step of training", _training_bytes(work, len(model.blocks)))))


def activations(work: Workload, tokens: int, streams: int, inside: bool = True) -> tuple[int, int]:
    """Bytes of all samples' activations between two groups of linears: expected, and the least.

    Args:
        work: the run.
        tokens: of all samples.
        streams: 1 or 2.
        inside: whether they are inside of a block, where the widest input is held; else hidden states alone.
    """
    model = work.model
    widest = max(group.in_features for group in model.groups)
    if not inside:
        hidden = tokens * streams * model.width * model.item
        return 2 * hidden, hidden
    expected = activation_bytes(tokens, streams, model.width, widest, model.dtype)
    return expected, tokens * streams * (widest + model.width) * model.item


def in_files(work: Workload) -> int:
    """Bytes of activations that lie in memory-mapped files."""
    room = work.options.activation_memory
    if room is None or work.home != "cpu":
        return 0
    inside = work.worker == "cpu"
    return max(0, activations(work, work.samples.total, 1 + work.two_streams, inside)[0] - room)


def _activations(work: Workload, tokens: int, streams: int, inside: bool, bounded: bool = True) -> Part:
    expected, least = activations(work, tokens, streams, inside)
    room = work.options.activation_memory
    if bounded and room is not None and work.home == "cpu":
        expected, least = min(expected, room), min(least, room)
    return Part("activations of all samples", expected, least if work.samples.exact else 0)


def _statistics(work: Workload) -> Part:
    """Of the input that takes the most, and its weights while they are solved."""
    return max((_solving(work, group) for group in dict.fromkeys(work.model.groups)), key=lambda part: part.bytes)


def _solving(work: Workload, group: LinearGroup) -> Part:
    square, weights = 4 * group.in_features**2, 4 * group.weights
    streams = 1 + work.two_streams
    expected = matrices(group.in_features, group.out_features, streams) * square + WEIGHT_COPIES * weights
    if group.expert:
        expected += _other_experts(work, group)
    return Part("statistics of the widest linear", expected, LEAST_MATRICES * square + LEAST_COPIES * weights)


def _other_experts(work: Workload, group: LinearGroup) -> int:
    """What waits while one of a block's experts is solved: statistics, signs found with these, and all new weights."""
    count = max(block.groups.count(group) for block in work.model.blocks)
    each = 4 * group.in_features**2 * (4 if work.two_streams else 1)  # Hessian and drift, of all and of a half
    together = min(count, -(-EXPERTS_WAITING // each))
    signs = together * group.weights * group.settings.planes
    return together * each + signs + count * group.weights * work.model.item


def _graph_bytes(work: Workload) -> int:
    """What autograd keeps of a token in one block: inputs and outputs of its linears, a few times the hidden state."""
    block = max(work.model.blocks, key=lambda each: each.weights)
    features = sum(group.share * (group.in_features + group.out_features) for group in block.groups)
    return round((features + 6 * work.model.width) * max(work.model.item, 4))


def _sensitivity_bytes(work: Workload) -> int:
    """Graphs, and the logits of a sample with what becomes of them on the way back."""
    model, samples = work.model, work.samples
    logits = LOGITS * samples.longest * model.vocabulary * 4
    if work.streamed:  # of all samples, what goes into blocks and comes out; and one block's graph
        held = sum(samples.spread(SAMPLES)) * len(model.blocks) * 3 * model.width * model.item
        return logits + held + samples.longest * _graph_bytes(work)
    room = activations(work, samples.total, 1 + work.two_streams)[0] if work.options.device is None else 0
    inputs = samples.longest * len(model.blocks) * model.width * model.item
    return logits + inputs + max(samples.longest * _graph_bytes(work), min(room, _whole_graph(work)))


def _whole_graph(work: Workload) -> int:
    return work.samples.longest * _graph_bytes(work) * len(work.model.blocks)


def _training_bytes(work: Workload, blocks: int) -> int:
    """A block's weights, their leaves and gradients, its graph; with several blocks, what goes in, and logits."""
    model, longest = work.model, work.samples.longest
    built = 3 * max(block.binarized for block in model.blocks) * max(model.item, 4)
    if blocks == 1:
        return built + longest * _graph_bytes(work)
    inputs = BATCH * longest * blocks * model.width * model.item
    logits = LOGITS * BATCH * longest * model.vocabulary * 4
    return built + inputs + logits + BATCH * longest * _graph_bytes(work)


def _slack(work: Workload, activations: int = 0) -> Part:
    """Grows with what has been let go before, the logits of a sample and the statistics; and with activations."""
    logits = LOGITS * work.samples.longest * work.model.vocabulary * 4
    before = min(ALLOCATOR, logits + _statistics(work).bytes)
    return Part("freed, not given back", before + round(SCATTERED * activations))


def _copied_block(work: Workload) -> Part:
    return Part("one block on its way", work.model.largest_block)
