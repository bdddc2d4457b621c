"""A model that cannot compute with packed layers is told so before the work, and the rehearsal leaves no trace."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from optimum_sab.calibration.options import RunOptions
from optimum_sab.calibration.pipeline import BINARIZE, STAGES
from optimum_sab.calibration.run import Run
from optimum_sab.calibration.samples.calibration_samples import CalibrationSamples
from optimum_sab.calibration.samples.modality import TokenModalities
from optimum_sab.calibration.stage import run_stages
from optimum_sab.calibration.stages.forward import LookAtForwards
from optimum_sab.calibration.stages.rehearsal import RehearseForward, telling_sample
from optimum_sab.calibration.stages.samples import GivenSamples
from optimum_sab.core.settings import LayerSettings
from optimum_sab.errors import CalibrationError
from optimum_sab.nn.linear import SABLinear
from optimum_sab.nn.selection import select_linears

SETTINGS = LayerSettings(block_size=32, iterations=2)

pytestmark = pytest.mark.filterwarnings("ignore::optimum_sab.errors.SABWarning")


class Mlp(nn.Module):
    def __init__(self, reads):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(32, 64), nn.Linear(64, 32)
        self._reads = reads

    def forward(self, x):
        if self._reads == "dtype":  # as T5, glm5_next and others do
            x = x.to(self.up_proj.weight.dtype)
        if self._reads == "weight":
            return self.down_proj(nn.functional.linear(x, self.up_proj.weight))
        return self.down_proj(self.up_proj(x).relu())


class Block(nn.Module):
    def __init__(self, reads):
        super().__init__()
        self.mlp = Mlp(reads)

    def forward(self, x):
        return x + self.mlp(x)


class Tiny(nn.Module):
    """A decoder whose last block reads its weights in some way; draws numbers in its forward."""

    def __init__(self, *reads):
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.layers = nn.ModuleList(Block(each) for each in reads)
        self.calls = []

    def forward(self, input_ids, use_cache=False):
        self.calls.append([m for m in self.modules() if isinstance(m, SABLinear)])
        torch.rand(3), random.random(), np.random.rand()
        x = self.embedding(input_ids)
        for block in self.layers:
            x = block(x)
        return x


def samples(*lengths):
    return [{"input_ids": torch.arange(n)[None] % 50} for n in lengths]


def rehearsed(model, given=None, **rules):
    run = Run(model, select_linears(model, SETTINGS, **rules), RunOptions())
    run_stages(run, (GivenSamples(given or samples(9, 4, 7)), RehearseForward()))
    return run


def test_rehearsal_is_one_forward_with_a_packed_block_of_every_kind():
    model = Tiny("", "", "")
    del model.layers[2].mlp.up_proj
    model.layers[2].mlp.gate_proj = nn.Linear(32, 64)
    model.layers[2].mlp.forward = lambda x: model.layers[2].mlp.down_proj(model.layers[2].mlp.gate_proj(x))
    dense = dict(model.named_modules())
    rehearsed(model)
    [packed] = model.calls
    assert len(packed) == 4  # of the first block and of the third; the second is as the first
    assert dict(model.named_modules()) == dense


def test_rehearsal_leaves_weights_order_and_generators_as_they_were():
    model = Tiny("", "")
    before, names = copy.deepcopy(model.state_dict()), [name for name, _ in model.named_modules()]
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    rehearsed(model)
    drawn = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    assert drawn == (torch.rand(1), random.random(), np.random.rand())
    assert [name for name, _ in model.named_modules()] == names
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("reads", "named"),
    [
        ("dtype", r"layers\.1\.mlp\.up_proj raises ConfigError: the input is torch\.int32.*\['mlp\.up_proj'\]"),
        ("weight", r"layers\.1\.mlp raises RuntimeError: .*=\['mlp\.up_proj', 'mlp\.down_proj'\]"),
    ],
)
def test_a_model_that_reads_packed_weights_is_refused_with_module_error_and_remedy(reads, named):
    model = Tiny("", reads)
    model.layers[1].__class__ = type("OtherBlock", (Block,), {})  # a kind of its own
    dense = dict(model.named_modules())
    with pytest.raises(CalibrationError, match=rf"Tiny does not compute with packed layers: {named}") as caught:
        rehearsed(model)
    assert caught.value.__cause__ is not None
    assert dict(model.named_modules()) == dense
    rehearsed(model, modules_to_not_convert=["layers.1"])  # the remedy


def test_a_sample_that_the_dense_model_does_not_read_is_told_as_that():
    with pytest.raises(CalibrationError, match=r"Tiny does not read a calibration sample: embedding raises IndexError"):
        rehearsed(Tiny("", ""), [{"input_ids": torch.tensor([[70]])}])


def test_a_forward_that_finds_no_room_is_told_as_that():
    model = Tiny("")

    def fail(x):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nand more")

    model.layers[0].mlp.forward = fail
    with pytest.raises(CalibrationError, match=r"does not find room \(CUDA out of memory.*\); give shorter samples"):
        rehearsed(model)


def test_the_sample_that_shows_most_in_fewest_tokens_is_taken():
    def labels(*of):
        return TokenModalities(("text", "visual"), torch.tensor(of))

    modalities = [labels(0, 0), labels(0, 1, 1, 1), labels(0, 1, 1), labels(0)]
    assert telling_sample(CalibrationSamples([{}] * 4, modalities)) == 2


def test_rehearsal_comes_behind_the_samples_and_before_anything_long():
    kinds = [type(stage) for stage in STAGES]  # of samples that are read
    assert kinds[:2] == [LookAtForwards, RehearseForward]


@pytest.mark.parametrize("family", ["llama"])
def test_rehearsal_changes_no_bit_of_the_result(build, family):
    def binarized(*before):
        subject = build(family)
        run = Run(subject.model, select_linears(subject.model, SETTINGS), RunOptions())
        run_stages(run, (GivenSamples(subject.samples), *before, *BINARIZE))
        return subject.model.state_dict()

    plain, tried = binarized(), binarized(RehearseForward())
    assert list(plain) == list(tried) and all(torch.equal(tried[name], tensor) for name, tensor in plain.items())


def test_every_family_computes_in_the_rehearsal(subject):
    rehearsed(subject.model, subject.samples)
