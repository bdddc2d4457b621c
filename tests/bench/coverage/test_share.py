"""The binarized share is of the language model's matrices alone, stacks of experts counted."""

import pytest
import torch
from torch import nn

from optimum_sab.bench.coverage.share import binarized_share, language_matrices
from optimum_sab.core.settings import LayerSettings
from optimum_sab.nn.linear import SABLinear


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(4, 32, 8))


def block():
    found = nn.Module()
    found.up = nn.Linear(32, 64)
    found.experts = Experts()
    found.mix = nn.Conv1d(8, 8, 3)
    found.scale = nn.Parameter(torch.zeros(4, 4))
    return found


def model():
    found = nn.Module()
    found.vision_tower = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(32, 32)])})
    found.layerwise_projectors = nn.ModuleList([nn.Linear(32, 32)])
    found.language_model = nn.ModuleDict({"layers": nn.ModuleList([block(), block()])})
    found.lm_head = nn.Linear(32, 100)
    return found


def test_matrices_are_linears_and_stacks_of_experts_in_blocks_of_the_language_model():
    found = language_matrices(model())
    assert set(found) == {
        f"language_model.layers.{index}.{name}" for index in (0, 1) for name in ("up.weight", "experts.gate_up_proj")
    }
    assert found["language_model.layers.0.experts.gate_up_proj"] == (4, 32, 8)


def test_language_model_can_be_named():
    assert set(language_matrices(model(), r"vision_tower\.")) == {"vision_tower.layers.0.weight"}


def test_share_counts_packed_linears_and_stacks_that_are_gone():
    dense = model()
    matrices = language_matrices(dense)
    assert binarized_share(dense, matrices) == 0.0
    whole, linear, stack = 2 * (32 * 64 + 4 * 32 * 8), 32 * 64, 4 * 32 * 8
    blocks = dense.language_model["layers"]
    blocks[0].up = SABLinear(32, 64, LayerSettings(block_size=32), True)
    assert binarized_share(dense, matrices) == pytest.approx(linear / whole)
    blocks[1].experts = nn.Module()
    assert binarized_share(dense, matrices) == pytest.approx((linear + stack) / whole)


def test_share_of_nothing_is_none_of_it():
    assert binarized_share(model(), {}) == 0.0
