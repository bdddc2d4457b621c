"""Gradients of many samples block after block are those of one sample after the other."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from optimum_sab.calibration.allocation.recomputation import Recomputation
from optimum_sab.calibration.allocation.sensitivity import output_sensitivity
from optimum_sab.calibration.streams import mapped
from optimum_sab.calibration.streams.mapped import MappedActivations
from optimum_sab.nn.streamed import StreamedBlock, is_streamed, streamed

LENGTHS = (5, 6, 9)
NAMES = [f"blocks.{index}.{name}" for index in range(3) for name in ("up", "down")]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, hidden, scale=None, own=0.0):
        return hidden + self.down(self.up(hidden + own).relu()) * scale, {"counted": torch.ones(2, dtype=torch.int64)}


class Model(nn.Module):
    """Writes into what a block gives, lets some samples pass a block by, and computes something for all blocks."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head, self.side = nn.Embedding(16, 8), nn.Linear(8, 16), nn.Linear(8, 3 * 8)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids):
        hidden = self.embedding(input_ids)
        first = hidden
        own = self.side(hidden).tanh().unflatten(-1, (3, 8))
        for index, block in enumerate(self.blocks):
            if index != 1 or input_ids.shape[1] % 2:
                hidden, _ = block(hidden, scale=torch.tensor(0.5), own=own[..., index, :])
                hidden[:, 0] += 0.1 * first[:, 0]
        return SimpleNamespace(logits=self.head(hidden + first * own[..., 0, :]))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().eval()


def sensitivities(model, bound=None):
    samples = [{"input_ids": torch.arange(length)[None] % 16} for length in LENGTHS]
    return output_sensitivity(model, NAMES, samples, Recomputation(list(model.blocks), mapped=bound))


def test_streamed_blocks_give_the_same_sensitivities_and_are_read_twice(model, tmp_path, monkeypatch):
    plain = sensitivities(model)
    reads = dict.fromkeys(range(3), 0)

    def source(index, weights):
        def read():
            reads[index] += 1
            return weights

        return StreamedBlock(f"blocks.{index}", read)

    sources = [
        source(index, {name: each.detach().clone() for name, each in block.named_parameters()})
        for index, block in enumerate(model.blocks)
    ]
    model.blocks.to("meta")
    monkeypatch.setattr(mapped, "SMALL", 1)
    with streamed(model, sources):
        assert all(is_streamed(block) for block in model.blocks)
        assert sensitivities(model) == plain
        assert reads == dict.fromkeys(range(3), 2)
        bound = MappedActivations(0, tmp_path)
        assert sensitivities(model, bound) == plain
        assert bound.mapped >= sum(LENGTHS) * 8 * 4 * 3  # what goes into blocks, and what the head is given
        assert not list(tmp_path.iterdir())
        assert all(each.is_meta for each in model.blocks.parameters())
    assert all(value > 0 for value in plain.values())
    assert not any(each.is_meta for each in model.parameters())
