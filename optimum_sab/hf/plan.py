"""A plan of a run, from a model on meta: what will be binarized, what it takes, and how long."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from optimum_sab.calibration.plan.duration import StageTime, stage_times
from optimum_sab.calibration.plan.expectation import Fit, fit_of, shortages
from optimum_sab.calibration.plan.fit import DiskUse
from optimum_sab.calibration.plan.limits import Room, process_bytes
from optimum_sab.calibration.plan.memory import DeviceMemory, memory_of
from optimum_sab.calibration.plan.reads import Pass, passes
from optimum_sab.calibration.plan.shapes import sample_sizes
from optimum_sab.calibration.plan.speeds import Speeds, measure_speeds
from optimum_sab.calibration.plan.workload import ModelShape, SampleSizes, Workload
from optimum_sab.calibration.progress import OnStep, no_step
from optimum_sab.calibration.samples.calibration_samples import CalibrationSamples
from optimum_sab.calibration.samples.held_out import held_out
from optimum_sab.calibration.samples.hub_dataset import check_readable
from optimum_sab.calibration.samples.inputs import evaluation_inputs, given_inputs, unseen_inputs
from optimum_sab.calibration.stages.samples import count_tokens, warn_of_few_tokens
from optimum_sab.calibration.streams.targets import target_linear
from optimum_sab.data.named_source import named_source
from optimum_sab.errors import SABWarning, warnings_heard
from optimum_sab.hf.binarization import check_settings
from optimum_sab.hf.config import SABConfig
from optimum_sab.hf.devices import is_here
from optimum_sab.hf.estimate import checkpoint_bytes
from optimum_sab.hf.run_options import run_options
from optimum_sab.hf.selection import select
from optimum_sab.hf.workload import at_most, disk_uses, rooms_of, workload
from optimum_sab.nn.decoder import foreign_modules, input_embedding
from optimum_sab.nn.selection import Selection, warn_of_idle_rules
from optimum_sab.nn.unfusing import unfuse_experts
from optimum_sab.presets import BUILTIN

EMBEDDINGS = "embeddings of tokens and the output embedding: predictions are read off there"
SENSES = "what reads pictures or sound: outside of the decoder blocks"
KEPT = "matrices in the blocks that a rule keeps, that route tokens, or that stand in a second place"
VECTORS = "norms and biases: no matrices"
OTHERS = "other matrices outside of the decoder blocks"


@dataclass(frozen=True)
class PlannedModel:
    """A dense model, and where it comes from.

    Attributes:
        factory: the model's class, or an auto class.
        source: its config.
        dtype: of the weights in memory.
        files: its safetensors files; None where they are not here.
        device_map: as `from_pretrained` takes it.
    """

    factory: Any
    source: Any
    dtype: torch.dtype
    files: Sequence[str] | None = None
    device_map: Any = None


@dataclass(frozen=True)
class Plan:
    """All that can be said of a run before a weight is read.

    Attributes:
        work: what goes through what.
        linears: how many are binarized.
        share: of the weights in the decoder blocks, that they hold.
        dense: parameters that stay dense, by why they do.
        bits_per_weight: of the binarized linears, from all that is stored of them, biases included.
        output: bytes of the packed checkpoint.
        tokens_from: how the number of calibration tokens is known.
        memory: by device.
        rooms: what these devices have.
        disks: what is written, but for the output.
        reads: of the decoder blocks, where they are streamed.
        speeds: that were measured; None without timing.
        times: by stage; none without timing.
        held: bytes of the machine's memory that this process holds already, and that ``memory`` counts.
        fits: by device, whether what is expected is free.
        warnings: that quantizing will give of the model, the rules, the samples as far as these could be read, and of
            memory and disks.
    """

    work: Workload
    linears: int
    share: float
    dense: Mapping[str, int]
    bits_per_weight: float
    output: int
    tokens_from: str
    memory: tuple[DeviceMemory, ...]
    rooms: Mapping[str, Room]
    disks: tuple[DiskUse, ...]
    reads: tuple[Pass, ...]
    speeds: Speeds | None
    times: tuple[StageTime, ...]
    held: int
    fits: Mapping[str, Fit]
    warnings: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        return sum(each.seconds for each in self.times)


def make_plan(
    model: PlannedModel, config: SABConfig, processor: Any, timing: bool = True, on_read: OnStep = no_step
) -> Plan:
    """Plan a run; no weight is read.

    Args:
        model: what is to be binarized.
        config: how.
        processor: the model's.
        timing: whether to measure this machine, for the time of every stage. One that has not the device that is
            asked for is not measured, with a warning.
        on_read: told how many samples are read.

    Raises:
        ConfigError, CalibrationError, MissingDependencyError: see `check_settings`, or a module rule fits nothing.
        SampleError: samples that can be read at once cannot be encoded.
        MissingDependencyError: no package is here that reads the Hub's datasets.
    """
    with torch.device("meta"):
        empty = model.factory.from_config(model.source).to(model.dtype)
    with warnings_heard() as heard, warnings.catch_warnings():
        warnings.simplefilter("ignore", SABWarning)  # whoever asked for the plan finds them in it
        selection = select(empty, config, strict=True)
        check_settings(empty, config, here=False)
        unfuse_experts(empty, selection.experts)
        warn_of_idle_rules(empty, selection, config.modules_to_not_convert)
        place = model.files, model.device_map
        work = workload(empty, selection, config, at_most(config), place)
        sizes, tokens_from = _samples(empty, selection, processor, config, (work.model, on_read))
    work = replace(work, samples=sizes)
    rooms, disks = rooms_of(work), disk_uses(work)
    held = process_bytes() or 0
    heard.extend(shortages(work, rooms, disks, refusing=not config.ignore_plan))
    away = next((each for each in (work.options.device, work.main) if each and not is_here(each)), None)
    if away is not None:
        heard.append(
            f"this machine has no {away}: the plan is for another that has, so whether its memory is enough, and how "
            "long the run takes, is not known. Quantizing needs the device; torch sees those that `optimum-sab env` "
            "lists."
        )
    speeds = measure_speeds(work) if timing and away is None else None
    shape = work.model
    binarized = sum(block.binarized for block in shape.blocks)
    return Plan(
        work,
        len(selection.settings),
        binarized / sum(block.weights for block in shape.blocks),
        _staying_dense(empty, selection),
        8.0 * (shape.packed_bytes + _bias_bytes(empty, selection)) / binarized,
        checkpoint_bytes(empty, selection, model.dtype, config.target_bits),
        tokens_from,
        memory_of(work, held),
        rooms,
        disks,
        passes(work),
        speeds,
        stage_times(work, speeds) if speeds else (),
        held,
        {each.device: fit_of(each, rooms.get(each.device)) for each in memory_of(work)},
        tuple(heard),
    )


def _samples(
    model: nn.Module, selection: Selection, processor: Any, config: SABConfig, how: tuple[ModelShape, OnStep]
) -> tuple[SampleSizes, str]:
    """Of samples that can be read at once; else the most that the settings allow. And which of the two."""
    options = run_options(config, here=False)
    source = options.source
    own = [] if options.evaluation is None else evaluation_inputs(model, processor, options.evaluation)
    if not _at_hand(config):
        if not source.written:
            check_readable(str(config.calibration))
        return at_most(config), "an upper bound, samples times sequence_length; pictures are not cut"
    shape, on_read = how
    inputs = given_inputs(model, processor, source, on_read)
    tokens = count_tokens(CalibrationSamples.of(inputs, model.config).modalities, model.config)
    warn_of_few_tokens(sum(tokens.values()), model, selection)
    try:
        unseen = [each for some in unseen_inputs(model, processor).values() for each in some]
    except Exception:  # such a model is not compared; a processor is anybody's code
        unseen = []
    sizes = sample_sizes(inputs, [*unseen, *held_out(own, inputs)], shape, model.config)
    return sizes, f"counted, of {source.described!r} as the model's processor encodes it"


def _bias_bytes(model: nn.Module, selection: Selection) -> int:
    """Of the binarized linears."""
    biases = (target_linear(model, name).bias for name in selection.settings)
    return sum(bias.nbytes for bias in biases if bias is not None)


def _at_hand(config: SABConfig) -> bool:
    """Whether the samples are on this machine: the built-in set, a file, or objects."""
    data = config.calibration
    if data is None or (isinstance(data, str) and data == BUILTIN):
        return True
    if not isinstance(data, (str, os.PathLike)):
        return True
    return not run_options(config, here=False).source.written and isinstance(named_source(data), Path)


def _staying_dense(model: nn.Module, selection: Selection) -> dict[str, int]:
    """Parameters by why they stay dense."""
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    foreign = foreign_modules(model)
    ends = {id(each) for each in (head, input_embedding(model)) if each is not None}
    found: dict[str, int] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        for tensor, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or (name in selection.settings and tensor == "weight"):
                continue
            seen.add(id(parameter))
            if id(module) in ends:
                why = EMBEDDINGS
            elif id(module) in foreign:
                why = SENSES
            elif parameter.ndim > 1 and selection.lists.holds(name):
                why = KEPT
            else:
                why = VECTORS if parameter.ndim < 2 else OTHERS
            found[why] = found.get(why, 0) + parameter.numel()
    return found
