import pytest
import torch
from torch import nn

from optimum_sab.calibration.streams.observation import Observation


class Block(nn.Module):
    """What it does with its second linear is told by its name."""

    def __init__(self, way="calls"):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.way = way

    def forward(self, x):
        x = self.first(x)
        return getattr(self, self.way)(x)

    def calls(self, x):
        return self.second(x)

    def calls_twice(self, x):
        return self.second(self.second(x))

    def reads_dtype(self, x):
        return self.second(x.to(self.second.weight.dtype))

    def reads_shape(self, x):
        return self.second(x).view(-1, self.second.weight.shape[0])

    def reads_device(self, x):
        return self.second(x.to(self.second.weight.device))

    def multiplies(self, x):
        return nn.functional.linear(x, self.second.weight, self.second.bias)

    def passes_it_in_a_list(self, x):
        return x @ torch.cat([self.second.weight, self.second.weight])[:8].T

    def clamps_in_training(self, x):
        if self.training:
            self.second.weight.data.clamp_(-0.01, 0.01)
        return self.second(x)

    def leaves_it(self, x):
        return x


def observed(*ways, x=None, training=False):
    torch.manual_seed(0)
    model = nn.Sequential(*map(Block, ways)).train(training)
    blocks = {str(i): block for i, block in enumerate(model)}
    linears = {name: each for name, each in model.named_modules() if isinstance(each, nn.Linear)}
    seen, x = Observation(), torch.randn(3, 8)
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        wanted = model.eval()(x) if not training else None
        model.train(training)
        given = seen.forward(lambda: model(x), blocks, linears)
    assert wanted is None or torch.equal(given, wanted)
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    assert all(type(p) is nn.Parameter for p in model.parameters())
    assert all("forward" not in vars(m) for m in model.modules())
    return seen


def test_calls_and_blocks_are_counted_in_their_order():
    seen = observed("calls", "calls_twice", "leaves_it")
    assert list(seen.entered.items()) == [("0", 1), ("1", 1), ("2", 1)]
    assert seen.called == {"0.first": 1, "0.second": 1, "1.first": 1, "1.second": 2, "2.first": 1}
    assert seen.read == {}


@pytest.mark.parametrize(
    ("way", "asked"),
    [
        ("reads_dtype", "dtype"),
        ("reads_shape", "shape"),
        ("multiplies", "linear"),
        ("passes_it_in_a_list", "cat"),
        ("reads_device", None),
    ],
)
def test_what_is_read_of_a_weight_outside_of_its_forward_is_named(way, asked):
    assert observed("calls", way).read == ({} if asked is None else {"1.second": asked})


def test_what_a_model_does_to_a_weight_in_training_is_done_to_a_copy():
    assert observed("clamps_in_training", training=True).read == {"0.second": "data"}
    assert observed("clamps_in_training").read == {}


def test_most_calls_of_several_forwards_are_kept():
    block, seen = Block(), Observation()
    linears = {"first": block.first, "second": block.second}
    for way in ("calls_twice", "calls"):
        block.way = way
        seen.forward(lambda: block(torch.randn(1, 8)), {"b": block}, linears)
    assert seen.called == {"first": 1, "second": 2} and seen.entered == {"b": 1}
