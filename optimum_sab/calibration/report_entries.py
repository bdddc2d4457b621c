"""Parts of a report as JSON values."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from optimum_sab.calibration.blocks.report import BlockReport, ExpertsReport
from optimum_sab.calibration.sizes import LinearSizes, Sizes


def block_entry(block: BlockReport) -> dict[str, Any]:
    """What was found at one block."""
    return {
        "index": block.index,
        "error": block.error,
        "by_modality": block.by_modality,
        "drift": block.drift,
        "bits_per_weight": block.bits_per_weight,
        "seconds": block.seconds,
        "wire_bytes": block.wire_bytes,
        "significance": None if block.significance is None else asdict(block.significance),
        "reconstruction": None if block.reconstruction is None else asdict(block.reconstruction),
        "experts": [_experts_entry(each) for each in block.experts],
        "layers": [{**asdict(layer), "by_modality": dict(layer.by_modality)} for layer in block.layers],
    }


def _experts_entry(experts: ExpertsReport) -> dict[str, Any]:
    modalities = dict.fromkeys(name for own in experts.tokens for name in own)
    return {
        "name": experts.name,
        "experts": len(experts.tokens),
        "mixed": experts.mixed,
        "tokens": experts.counts,
        "by_modality": {name: [own.get(name, 0) for own in experts.tokens] for name in modalities},
    }


def sizes_entry(sizes: Sizes | None) -> dict[str, Any] | None:
    """Where the bytes are; None where they were not counted."""
    if sizes is None:
        return None
    return {
        "total": sizes.total_bytes,
        "total_before": sizes.total_before,
        "packed": sizes.packed_bytes,
        "packed_before": sizes.dense_linears,
        "kinds": _table(sizes.kinds),
        "planes": _table(sizes.planes),
        "tensors": dict(sizes.tensors),
        "dense": dict(sizes.dense),
    }


def _table(entries: Any) -> dict[str, Any]:
    return {name: {**asdict(each), "bits_per_weight": _bits(each)} for name, each in entries.items()}


def _bits(sizes: LinearSizes) -> float:
    return 8.0 * sizes.bytes / sizes.weights
