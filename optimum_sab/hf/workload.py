"""From a model on meta and a configuration to what `calibration.plan` works with: shapes, devices, disks."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from optimum_sab.calibration.plan.fit import DiskUse
from optimum_sab.calibration.plan.holdings import activations, in_files
from optimum_sab.calibration.plan.limits import Room, accelerator_room, machine_room
from optimum_sab.calibration.plan.memory import ACCELERATOR, MACHINE
from optimum_sab.calibration.plan.shapes import model_shape, sample_sizes
from optimum_sab.calibration.plan.workload import SampleSizes, Workload
from optimum_sab.calibration.samples.inputs import UNSEEN_LENGTH
from optimum_sab.data.unseen import unseen_texts
from optimum_sab.errors import ConfigError
from optimum_sab.hf.config import SABConfig
from optimum_sab.hf.devices import SPREADS, accelerators, is_here, main_device
from optimum_sab.hf.run_options import run_options
from optimum_sab.hf.stored_files import read_headers
from optimum_sab.hf.streaming import check_stored, check_streaming
from optimum_sab.nn.selection import Selection

_NUMBERED_EXPERT = re.compile(r"\.experts\.\d+\.")


def workload(
    model: nn.Module,
    selection: Selection,
    config: SABConfig,
    sizes: SampleSizes | Sequence[Mapping[str, Any]],
    place: tuple[Sequence[str] | None, Any],
    unseen: Sequence[Mapping[str, Any]] = (),
) -> Workload:
    """What `calibration.plan` works with.

    Args:
        model: dense, experts as linears; may be on meta.
        selection: what is binarized.
        config: how.
        sizes: of the samples, or the samples' forward arguments.
        place: the checkpoint's files, as far as they are here, and the device map.
        unseen: forward arguments of what the finished model will be compared with.
    """
    files, device_map = place
    options = run_options(config, here=False)  # who runs it has tried the device
    shape = model_shape(model, selection, config.target_bits)
    shape = replace(shape, copied=_copied(files, shape.dtype, selection))
    if not isinstance(sizes, SampleSizes):
        sizes = sample_sizes(sizes, unseen, shape, model.config) if sizes else at_most(config)
    home = main_device(device_map)
    spread = len(accelerators(device_map)) > 1 or (isinstance(device_map, str) and device_map in SPREADS)
    work = Workload(shape, sizes, options, options.two_streams(selection), config.stream_weights, home, spread)
    return replace(work, streamable=_streamable(work, files, device_map))


def _streamable(work: Workload, files: Sequence[str] | None, device_map: Any) -> bool:
    """Whether `stream_weights` would be taken, and its scratch files find room."""
    try:
        check_streaming({}, device_map)
        check_stored(files)
    except ConfigError:
        return False
    return _scratch_bytes(work) <= _free(_scratch_folder(work))


def _scratch_bytes(work: Workload) -> int:
    model = work.model
    return model.packed_bytes + model.left_bytes + model.outside * model.item


def _scratch_folder(work: Workload) -> str:
    return os.fspath(work.options.resume_folder or tempfile.gettempdir())


def rooms_of(work: Workload) -> dict[str, Room]:
    """What the devices of a run have."""
    rooms = {MACHINE: machine_room()}
    device = work.options.device if work.home == "cpu" else work.main
    if device is not None and device.type != "cpu":
        room = accelerator_room(device) if is_here(device) else Room(None, None, f"{device}, of another machine")
        # what does not fit on one may fit on several
        rooms[ACCELERATOR] = replace(room, total=None, free=None) if work.spread and work.home != "cpu" else room
    return rooms


def disk_uses(work: Workload) -> tuple[DiskUse, ...]:
    """What a run writes beside the output."""
    options, found = work.options, []
    if options.resume_folder is not None:
        folder = os.fspath(options.resume_folder)
        there = sum(each.stat().st_size for each in Path(folder).glob("block-*.safetensors"))
        size = max(0, work.model.packed_bytes - there)
        found.append(DiskUse("finished blocks", folder, size, _free(folder), "resume_folder", size))
    folder = _scratch_folder(work)
    if work.streamed:
        size = _scratch_bytes(work)
        found.append(DiskUse("scratch files", folder, size, _free(folder), "stream_weights", size))
    mapped = in_files(work)
    if mapped:
        tokens = work.samples.total if work.samples.exact else 0
        least = activations(work, tokens, 1 + work.two_streams, work.worker == "cpu")[1]
        certain = max(0, least - (options.activation_memory or 0))
        found.append(DiskUse("activations", folder, mapped, _free(folder), "activation_memory", certain))
    return tuple(found)


def _free(folder: str) -> int:
    resolved = Path(folder).resolve()
    return shutil.disk_usage(next(each for each in (resolved, *resolved.parents) if each.is_dir())).free


def _copied(files: Sequence[str] | None, dtype: torch.dtype, selection: Selection) -> float:
    """Share of the weights that Transformers copies: of another dtype, or experts that it merges.

    0 where the files are not known, or are no safetensors files: that is what takes least.
    """
    if not files or not all(str(file).endswith(".safetensors") for file in files):
        return 0.0
    wanted, total, copied = str(dtype).removeprefix("torch."), 0, 0
    for file in read_headers(list(map(str, files))):
        for name, tensor in file.tensors.items():
            if tensor.is_floating:
                total += tensor.bytes
                merged = bool(selection.experts) and _NUMBERED_EXPERT.search(name) is not None
                copied += tensor.bytes if merged or tensor.dtype_name != wanted else 0
    return copied / max(1, total)


def at_most(config: SABConfig) -> SampleSizes:
    """The most that the settings allow: every text as long as it may be."""
    count = config.calibration_samples
    unseen = (UNSEEN_LENGTH,) * len(unseen_texts())
    return SampleSizes((config.sequence_length,) * count, 0, False, unseen)
