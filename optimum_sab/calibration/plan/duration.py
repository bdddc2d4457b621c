"""Seconds of every stage: operation counts over what this machine was measured at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from optimum_sab.calibration.allocation.ladder import ANCHORS, probed_settings
from optimum_sab.calibration.allocation.probe import ROWS
from optimum_sab.calibration.plan import operations
from optimum_sab.calibration.plan.holdings import activations, tempered_tokens
from optimum_sab.calibration.plan.speeds import Speeds
from optimum_sab.calibration.plan.workload import LinearGroup, Workload
from optimum_sab.calibration.refine.tuning import BATCH, JUDGEMENTS
from optimum_sab.calibration.samples.prompts import EACH, OPENING
from optimum_sab.calibration.stages.allocation import SAMPLES
from optimum_sab.calibration.stages.examples import NEW_TOKENS

SCALES_TRIED = 10  # of the temperature, by golden section; a normalizer is about a half of a divergence
DRAWN = 6  # divergences that the softmax, a draw from it, and the way back through both take


@dataclass(frozen=True)
class StageTime:
    """One stage.

    Attributes:
        name: as the report has it.
        seconds: expected.
    """

    name: str
    seconds: float


def stage_times(work: Workload, speeds: Speeds) -> tuple[StageTime, ...]:
    """Seconds of the stages that take any, in order; reading from disk is not among them.

    Args:
        work: the run.
        speeds: of this machine.
    """
    return tuple(StageTime(name, seconds) for name, seconds in _stages(work, speeds) if seconds > 0)


def _stages(work: Workload, speeds: Speeds) -> Iterator[tuple[str, float]]:
    model, samples, options = work.model, work.samples, work.options
    forward = _Forward(work, speeds)
    dense_bytes = model.outside * model.item + model.block_bytes
    yield "loading", dense_bytes / speeds.reading
    typical = samples.longest
    one = forward([typical]) + operations.head(work, typical) / speeds.forward
    yield "forward", (samples.kinds + 1) * one
    yield "rehearsal", one
    yield "answers", forward(samples.unseen)
    writes = options.examples and model.vocabulary > 0 and not work.streamed
    prompts = EACH * min(samples.kinds, 2)
    token = operations.products(work, 1) + operations.head(work, 1)
    read = prompts * operations.products(work, OPENING)
    if writes:
        yield "dense examples", read / speeds.forward + prompts * NEW_TOKENS * token / speeds.one_row
    if options.allocation is not None:
        yield "sensitivities", _sensitivities(work, speeds)
        yield "allocation", _allocation(work, speeds)
    yield "blocks", _blocks(work, speeds)
    if options.temperature_scaling and work.two_streams and model.vocabulary:
        judged = tempered_tokens(work)
        logits = 4 * operations.head(work, judged) / speeds.forward
        elements = operations.predictions(work, judged)
        yield "temperature", logits + (4 + SCALES_TRIED / 2) * elements / speeds.predictions
    if options.tuned:
        yield "tuning", _tuning(work, speeds)
    if model.vocabulary:
        judged = sum(samples.judged or samples.unseen)
        logits = 2 * operations.head(work, judged) / speeds.forward
        packed = operations.products(work, sum(samples.unseen)) / speeds.packed
        packed += forward.rest(samples.unseen)
        yield "comparison", packed + logits + 2 * operations.predictions(work, judged) / speeds.predictions
    if writes:
        head = operations.head(work, 1) / speeds.one_row
        written = operations.products(work, 1) / speeds.packed_row + head
        yield "examples", read / speeds.packed + prompts * NEW_TOKENS * written
    yield "saving", 2 * (model.outside * model.item + model.packed_bytes) / speeds.reading


@dataclass(frozen=True)
class _Forward:
    """Seconds of samples through the decoder blocks, dense."""

    work: Workload
    speeds: Speeds

    def __call__(self, samples: Sequence[int], patches: int = 0) -> float:
        products = operations.products(self.work, sum(samples), patches) / self.speeds.forward
        return products + self.rest(samples)

    def rest(self, samples: Sequence[int]) -> float:
        """All but the products with weights."""
        attention = operations.attention(self.work, samples) / self.speeds.attention
        return attention + operations.elementwise(self.work, sum(samples)) / self.speeds.elementwise


def _sensitivities(work: Workload, speeds: Speeds) -> float:
    """Forth and back, and forth again in blocks that do not remember their way."""
    few = work.samples.spread(SAMPLES)
    patches = round(work.samples.patches * len(few) / len(work.samples.tokens))
    inside = _Forward(work, speeds)(few, patches)
    room = activations(work, work.samples.total, 1 + work.two_streams)[0]
    again = 1.0
    if not work.streamed and work.options.device is None:
        again = 1.0 - min(1.0, room / max(1, work.samples.longest * remembered(work)))
    judged = work.samples.judged_share * sum(few)
    logits = 2 * operations.head(work, judged) / speeds.forward
    drawn = DRAWN * operations.predictions(work, judged) / speeds.predictions
    return (2.0 + again) * inside + logits + drawn


def remembered(work: Workload) -> int:
    """Bytes that all blocks remember of a token for its gradients."""
    features = sum(group.share * (group.in_features + group.out_features) for group in work.model.groups)
    return round((features + 6 * work.model.width * len(work.model.blocks)) * work.model.item)


def _allocation(work: Workload, speeds: Speeds) -> float:
    """One stream of a few samples; of every linear `ROWS` rows are solved at every anchor."""
    few = work.samples.spread(SAMPLES)
    patches = round(work.samples.patches * len(few) / len(work.samples.tokens))
    seconds = _Forward(work, speeds)(few, patches)
    for group in work.model.groups:
        seconds += operations.second_moments(group, sum(few), False, work.worker == "cpu") / speeds.moments
        seconds += speeds.factoring(group.in_features)
        rows = min(ROWS * group.members, group.out_features)
        for level in ANCHORS:
            quick = probed_settings(group.settings, level)
            counts = operations.solving(rows, group.in_features, quick, False)
            counts["errors"] *= 2  # once more of every linear by itself
            del counts["factorization"], counts["packing"]  # once for all anchors; never
            seconds += speeds.solve(counts, quick)
    return seconds


def _blocks(work: Workload, speeds: Speeds) -> float:
    tokens, streams = work.samples.total, 1 + work.two_streams
    once = _Forward(work, speeds)(work.samples.tokens, work.samples.patches)
    options = work.options
    times: float = streams + (options.refine is not None or options.resume_folder is not None)
    if options.refine is not None and options.refine.epochs:
        times += options.refine.epochs * 3.3  # forth, back to inputs and weights, and a tenth to judge by
    seconds, on_cpu = times * once, work.worker == "cpu"
    for group in work.model.groups:
        seconds += operations.second_moments(group, tokens, work.two_streams, on_cpu) / speeds.moments
        seconds += operations.errors_by_modality(group, tokens, work.samples.kinds) / speeds.moments
        seconds += _group(group, work.two_streams, speeds)
    return seconds


def _group(group: LinearGroup, two_streams: bool, speeds: Speeds) -> float:
    """Seconds of solving linears that share an input, factors included."""
    corrected = operations.gathers_correction(group, two_streams)
    counts = operations.solving(group.out_features, group.in_features, group.settings, two_streams, corrected)
    if group.expert:
        return speeds.solve(counts, group.settings, expert=True)
    del counts["factorization"]
    return speeds.factoring(group.in_features) + speeds.solve(counts, group.settings)


def _tuning(work: Workload, speeds: Speeds) -> float:
    """Every step goes forth, forth again and back; a tenth of the samples judges `JUDGEMENTS` times."""
    refine = work.options.refine
    assert refine is not None
    samples = work.samples
    mean = samples.total / len(samples.tokens)
    step = BATCH * (4.0 * operations.products(work, mean) + 4.0 * operations.head(work, samples.judged_share * mean))
    judging = JUDGEMENTS * samples.total / 10
    judged = samples.judged_share * judging
    judges = operations.products(work, judging) + 2.0 * operations.head(work, judged)
    elements = operations.predictions(work, refine.steps * BATCH * 2 * samples.judged_share * mean + judged)
    return (refine.steps * step + judges) / speeds.forward + elements / speeds.predictions
