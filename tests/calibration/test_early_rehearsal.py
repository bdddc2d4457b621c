"""What a model cannot do with packed layers is seen without its weights, nothing else is refused, and nothing stays."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from optimum_sab.calibration.early_rehearsal import rehearse_unloaded
from optimum_sab.core.settings import LayerSettings
from optimum_sab.errors import CalibrationError
from optimum_sab.nn.linear import SABLinear
from optimum_sab.nn.selection import select_linears

SETTINGS = LayerSettings(block_size=32, iterations=2)
IDS = torch.arange(9)[None]


class Block(nn.Module):
    """A decoder block that does ``does`` with its linears and its input before it computes."""

    def __init__(self, does, width, wide):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(width, wide), nn.Linear(wide, width, bias=False)
        self.register_buffer("table", torch.zeros(3), persistent=False)
        self._does = does
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        self.packed = isinstance(self.up_proj, SABLinear)
        if self._does is not None:
            x = self._does(self, x)
        return x + self.down_proj(self.up_proj(x).relu())


class Tiny(nn.Module):
    def __init__(self, *does, width=32, wide=64, words=50):
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.layers = nn.ModuleList(Block(each, width, wide) for each in does)
        self.scale = nn.Parameter(torch.ones(()))

    def initialize_weights(self):
        for block in self.layers:
            block.table.copy_(torch.arange(3.0))

    def forward(self, input_ids, mask=None, use_cache=False):
        torch.rand(3), random.random(), np.random.rand()
        self.seen = input_ids
        x = self.embedding(input_ids) * self.scale
        if mask is not None:
            x = x * mask[..., None]
        for block in self.layers:
            x = block(x)
        return x


def meta(*does, **sizes):
    with torch.device("meta"):
        return Tiny(*does, **sizes)


def rehearsed(model, elsewhere=False, **sample):
    selection = select_linears(model, SETTINGS)
    return rehearse_unloaded(model, selection, {"input_ids": IDS, **sample}, elsewhere)


def raising(kind, text):
    def does(block, x):
        raise kind(text(block, x) if callable(text) else text)

    return does


def wants_linears(block, x):
    if not isinstance(block.up_proj, nn.Linear):
        raise TypeError("up_proj must be an nn.Linear")
    return x


def test_the_forward_runs_with_a_packed_block_of_every_kind_and_ends_behind_the_last():
    seen = []

    def note(block, x):
        seen.append((block.packed, block.table.tolist(), x.device.type, torch.is_grad_enabled(), block.training))
        return x

    model = meta(note, note, note, note)
    del model.layers[2].up_proj
    model.layers[2].up_proj = nn.Linear(32, 64, device="meta")  # of another order: a kind of its own
    assert rehearsed(model)
    inside = ([0.0, 1.0, 2.0], "cpu", False, False)
    assert seen == [(True, *inside), (False, *inside), (True, *inside)]


def state(model):
    """Everything of every module, by identity."""

    def held(value):
        return [(key, id(each)) for key, each in value.items()] if isinstance(value, dict) else id(value)

    return {name: [(key, held(value)) for key, value in vars(module).items()] for name, module in model.named_modules()}


@pytest.mark.parametrize("fails", [None, wants_linears, raising(ImportError, "no flash")])
def test_nothing_of_the_model_the_generators_or_the_sample_is_changed(fails):
    def leave_traces(block, x):
        block.register_forward_hook(lambda *_: None)
        block.table.add_(1)
        block.forgotten = x
        x.add_(1)
        return fails(block, x) if fails else x

    model = meta(leave_traces, leave_traces)
    model.embedding.register_forward_pre_hook(lambda *_: None)
    model.layers[1].eval()
    ids, before = IDS.clone(), state(model)
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    if fails is None:
        assert rehearsed(model, input_ids=ids)
    else:
        with pytest.raises(CalibrationError):
            rehearsed(model, input_ids=ids)
    drawn = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    assert drawn == (torch.rand(1), random.random(), np.random.rand())
    assert state(model) == before
    assert all(each.is_meta for each in (*model.parameters(), *model.buffers()))
    assert torch.equal(ids, IDS)


def test_a_sample_that_is_written_to_is_written_to_in_a_copy():
    def clear(block, x):
        model.seen.zero_()
        return x

    model, ids = meta(clear), IDS.clone()
    assert rehearsed(model, input_ids=ids)
    assert torch.equal(ids, IDS)


def test_a_model_that_does_not_compute_with_packed_layers_is_refused():
    named = r"Tiny does not compute with packed layers: layers\.1 raises TypeError: up_proj must be .*\['up_proj', 'do"
    model = meta(None, wants_linears)
    model.layers[1].__class__ = type("OtherBlock", (Block,), {})
    with pytest.raises(CalibrationError, match=named) as caught:
        rehearsed(model)
    assert isinstance(caught.value.__cause__, TypeError)
    with pytest.raises(CalibrationError, match=named):  # wherever it will compute
        rehearsed(model, elsewhere=True)


def test_linears_that_stay_dense_because_the_model_reads_them_are_no_reason_to_refuse():
    assert rehearsed(meta(lambda block, x: x.to(block.up_proj.weight.dtype)))
    assert rehearsed(
        meta(lambda block, x: block.down_proj(block.up_proj(x)) * 0 + x)
    )  # calls them twice, packed or not


def test_a_model_of_which_nothing_is_left_is_refused():
    def read_all(block, x):
        return nn.functional.linear(nn.functional.linear(x, block.up_proj.weight), block.down_proj.weight)

    with pytest.raises(CalibrationError, match=r"nothing is left to binarize in Tiny: 2 linears.* reads their weight"):
        rehearsed(meta(read_all))


@pytest.mark.parametrize(
    ("does", "sample", "told"),
    [
        (None, {"wibble": IDS}, r"its forward raises TypeError: .* unexpected keyword argument 'wibble'"),
        (None, {"mask": torch.ones(1, 5)}, r"its forward raises RuntimeError: The size of tensor a \(9\) must match"),
        (None, {"input_ids": IDS + 45}, "embedding raises IndexError: index out of range"),
        (raising(ImportError, "pip install wibble"), {}, r"layers\.0 raises ImportError: pip install wibble"),
        (lambda block, x: x[..., :-1], {}, r"up_proj raises RuntimeError: mat1 and mat2 shapes .* \(9x31 and 32x64\)"),
    ],
)
def test_what_a_dense_model_cannot_do_whatever_its_weights_is_refused(does, sample, told):
    with pytest.raises(CalibrationError, match=f"Tiny does not read a calibration sample: .*{told}"):
        rehearsed(meta(does), **sample)


def refuses_zeros(block, x):
    if not block.down_proj.weight.any():
        raise ValueError("an empty matrix")
    return x


def test_a_model_that_some_values_stop_is_tried_with_others():
    assert rehearsed(meta(refuses_zeros))

    def both(block, x):
        return wants_linears(block, refuses_zeros(block, x))

    with pytest.raises(CalibrationError, match=r"does not compute with packed layers: .* must be an nn\.Linear"):
        rehearsed(meta(both))


@pytest.mark.parametrize(
    "does",
    [
        raising(ValueError, lambda block, x: f"{float(block.down_proj.weight.sum())} is no good sum"),
        raising(RuntimeError, "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate"),
        raising(MemoryError, "no room"),
        raising(NotImplementedError, "Cannot copy out of meta tensor; no data!"),
    ],
)
def test_what_may_be_the_stand_ins_doing_is_left_to_the_loaded_model(does):
    assert rehearsed(meta(does)) is False


def test_a_packed_layer_that_finds_no_room_is_left_to_the_loaded_model():
    def does(block, x):
        if block.packed:
            raise MemoryError
        return x

    assert rehearsed(meta(does)) is False


def test_a_model_that_cannot_make_its_buffers_is_left_to_the_loaded_one():
    model = meta(None)
    model.initialize_weights = raising(RuntimeError, "of its own").__get__(model)
    before = state(model)
    assert rehearsed(model) is False
    assert state(model) == before


def test_elsewhere_only_what_no_device_can_do_is_refused():
    needs_another_device = raising(RuntimeError, "FlashAttention only supports CUDA")
    with pytest.raises(CalibrationError):
        rehearsed(meta(needs_another_device))
    assert rehearsed(meta(needs_another_device), elsewhere=True) is False
    with pytest.raises(CalibrationError, match="unexpected keyword argument"):
        rehearsed(meta(None), elsewhere=True, wibble=IDS)


class Made(TorchDispatchMode):
    """Elements that operators make, in storage that was not there before."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {each.untyped_storage().data_ptr() for each in args if isinstance(each, torch.Tensor)}
        output = func(*args, **(kwargs or {}))
        for each in output if isinstance(output, (tuple, list)) else [output]:
            real = isinstance(each, torch.Tensor) and not each.is_meta
            if real and each.untyped_storage().data_ptr() not in given:
                self.elements += each.untyped_storage().nbytes() // each.itemsize
        return output


def made(blocks, fails=None):
    model = meta(*[fails] * blocks, width=1024, wide=4096, words=50_000)
    with Made() as counted:
        if fails is None:
            assert rehearsed(model)
        else:
            assert rehearsed(model) is False
    return counted.elements


def test_what_is_made_does_not_grow_with_the_model():
    one, block = made(1), 2 * 1024 * 4096
    assert one < block  # of 6 times as many parameters in the embedding: packed words, and what they are drawn from
    assert made(40) - one < 40 * 4 * 4096  # vectors
    assert made(3, raising(ValueError, lambda block, x: str(block.up_proj.weight[0, 0]))) < 3 * block  # packed twice
