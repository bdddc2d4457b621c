"""Bytes of each thing that a run holds, from shapes: the one place with the formulas of memory."""

from __future__ import annotations

from dataclasses import dataclass

from optimum_sab.calibration.blocks.experts import ROOM
from optimum_sab.calibration.plan.workload import LinearGroup, Workload
from optimum_sab.calibration.predictions.temperature import TOKENS
from optimum_sab.calibration.refine.tuning import BATCH
from optimum_sab.calibration.stages.allocation import SAMPLES
from optimum_sab.calibration.stages.head import TEMPERATURE_SAMPLES
from optimum_sab.calibration.streams.memory import activation_bytes, matrices

LEAST_MATRICES = 3  # of those [in, in]: a Hessian, damped, and the factor of its inverse
WEIGHT_COPIES = 4  # fp32 arrays of a weight's shape while it is solved: W, target, pull, what is left
LEAST_COPIES = 2
LOGITS = 8  # arrays of the logits' size, in fp32, while predictions are differentiated
COMPARED = 4  # in the model's dtype, while they are compared: both models', each also beside the other
ALLOCATOR = 200 * 2**20  # what earlier stages leave behind in the process when they let go of small pieces, at the most
SCATTERED = 0.2  # of the activations, that lies between them unused: measured with the embedded example


@dataclass(frozen=True)
class Part:
    """Something that takes memory.

    Attributes:
        name: what it is.
        bytes: expected.
        certain: of these, that no way of computing can do without; 0 where the system may drop or spare it.
        mapped: of the bytes, pages of the checkpoint's files, which the system can let go of and read again.
    """

    name: str
    bytes: int
    certain: int = 0
    mapped: int = 0


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
    waiting = activations(work, work.samples.total, 1 + work.two_streams, inside)[0]
    if work.streamed and work.options.allocation is not None:
        waiting = max(waiting, _inputs_of_blocks(work))  # which are gone by then
    return max(0, waiting - room)


def activations_part(work: Workload, tokens: int, streams: int, inside: bool, bounded: bool = True) -> Part:
    expected, least = activations(work, tokens, streams, inside)
    room = work.options.activation_memory
    if bounded and room is not None and work.home == "cpu":
        expected, least = min(expected, room), min(least, room)
    return Part("activations of all samples", expected, least if work.samples.exact else 0)


def statistics_part(work: Workload) -> Part:
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
    together = min(count, -(-ROOM // each))
    signs = together * group.weights * group.settings.planes
    return together * each + signs + count * group.weights * work.model.item


def graph_bytes(work: Workload) -> int:
    """What autograd keeps of a token in one block: inputs and outputs of its linears, a few times the hidden state."""
    block = max(work.model.blocks, key=lambda each: each.weights)
    features = sum(group.share * (group.in_features + group.out_features) for group in block.groups)
    return round((features + 6 * work.model.width) * max(work.model.item, 4))


def sensitivity_bytes(work: Workload, inside: bool = True) -> int:
    """Graphs, and the logits of a sample's judged tokens with what becomes of them on the way back.

    Args:
        work: the run.
        inside: whether the blocks compute on the device that is asked about.
    """
    model, samples = work.model, work.samples
    logits = LOGITS * samples.most_logits * model.vocabulary * 4
    graph = samples.longest * graph_bytes(work) if inside else 0
    if work.streamed:  # all samples' inputs of blocks; and one block's graph
        held, room = _inputs_of_blocks(work), work.options.activation_memory
        return logits + (held if room is None else min(held, room)) + graph
    room = activations(work, samples.total, 1 + work.two_streams)[0] if work.options.device is None else 0
    inputs = samples.longest * len(model.blocks) * model.width * model.item
    return logits + inputs + max(graph, min(room, _whole_graph(work)))


def _inputs_of_blocks(work: Workload) -> int:
    """Of the samples that sensitivities are measured with, where they go together: and two of these as gradients."""
    model = work.model
    return few_tokens(work) * (len(model.blocks) + 2) * model.width * model.item


def tempered_tokens(work: Workload) -> int:
    """By which the temperature is fitted."""
    judged = work.samples.judged_share * sum(work.samples.spread(TEMPERATURE_SAMPLES))
    return min(TOKENS, round(judged))


def few_tokens(work: Workload) -> int:
    """Of the samples on this rank that sensitivities and errors for the allocation are measured with."""
    return sum(work.samples.spread(-(-SAMPLES // work.ranks)))


def _whole_graph(work: Workload) -> int:
    return work.samples.longest * graph_bytes(work) * len(work.model.blocks)


def training_bytes(work: Workload, blocks: int) -> int:
    """A block's weights, their leaves and gradients, its graph; with several blocks, what goes in, and logits."""
    model, longest = work.model, work.samples.longest
    built = 3 * max(block.binarized for block in model.blocks) * max(model.item, 4)
    if blocks == 1:
        return built + longest * graph_bytes(work)
    inputs = BATCH * longest * blocks * model.width * model.item
    logits = LOGITS * BATCH * work.samples.most_logits * model.vocabulary * 4
    return built + inputs + logits + BATCH * longest * graph_bytes(work)


def slack_of(work: Workload, activations: int = 0) -> Part:
    """Grows with what has been let go before, the logits of a sample and the statistics; and with activations."""
    logits = LOGITS * work.samples.most_logits * work.model.vocabulary * 4
    before = min(ALLOCATOR, logits + statistics_part(work).bytes)
    return Part("freed, not given back", before + round(SCATTERED * activations))


def copied_block(work: Workload) -> Part:
    return Part("one block on its way", work.model.largest_block)
