"""Workloads of stated shapes, without a model."""

from dataclasses import replace

import pytest
import torch

from optimum_sab.calibration.options import AllocationSettings, RunOptions
from optimum_sab.calibration.plan.workload import BlockShape, LinearGroup, ModelShape, SampleSizes, Workload
from optimum_sab.core.settings import LayerSettings

WIDTH, INNER, VOCABULARY, BLOCKS = 1024, 4096, 32000, 10


@pytest.fixture
def work():
    """Ten blocks of 1,024 features in bfloat16 that are read from maps; 512 samples of 256 tokens in two streams."""
    settings = LayerSettings()
    groups = (
        LinearGroup(3, 3 * WIDTH, WIDTH, settings),
        LinearGroup(1, WIDTH, WIDTH, settings, at_residual=True),
        LinearGroup(2, 2 * INNER, WIDTH, settings),
        LinearGroup(1, WIDTH, INNER, settings, at_residual=True),
    )
    weights = sum(group.weights for group in groups)
    block = BlockShape("layers.0", weights, weights * 5 // 32, groups, weights)
    model = ModelShape(
        (block,) * BLOCKS, 2 * VOCABULARY * WIDTH, VOCABULARY * WIDTH, WIDTH, VOCABULARY, 0, 0, torch.bfloat16
    )
    samples = SampleSizes((256,) * 512, unseen=(200,) * 6)
    return Workload(model, samples, RunOptions(allocation=AllocationSettings()), True)


@pytest.fixture
def changed():
    """A workload with other options, and other parts of its own."""

    def change(work, copied=None, **changes):
        own = {
            name: changes.pop(name)
            for name in ("streamed", "streamable", "main", "samples", "two_streams")
            if name in changes
        }
        model = work.model if copied is None else replace(work.model, copied=copied)
        return replace(work, model=model, options=replace(work.options, **changes), **own)

    return change
