"""Adapters on members of a group that is computed in one launch (Triton's interpreter, or a GPU)."""

import pytest
import torch
from torch import nn

from optimum_sab.core.settings import LayerSettings
from optimum_sab.format.packed_weight import PackedWeight
from optimum_sab.nn.input_group import SHARED, group_linears
from optimum_sab.nn.linear import SABLinear
from optimum_sab.ops import force_backend
from optimum_sab.ops.verification import sample_weight

peft = pytest.importorskip("peft")
sab_kernels = pytest.importorskip("sab_kernels", exc_type=ImportError)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES, WIDTH = {"q": 64, "k": 32, "v": 32}, 128
AXES = {"weight": 1, "residual_sign": 1, "row_scale": 2, "row_exponent": 0}  # of the rows


class Attention(nn.Module):
    """q, k and v of one input as the solver makes them: rows of one packed matrix."""

    def __init__(self):
        super().__init__()
        settings, start = LayerSettings(), 0
        whole = sample_weight(settings, sum(SIZES.values()), WIDTH).tensors
        for name, size in SIZES.items():
            rows = torch.arange(start, start + size)
            own = {n: t.clone() if n in SHARED else t.index_select(AXES[n], rows) for n, t in whole.items()}
            setattr(self, name, SABLinear.from_packed(PackedWeight(own, size, WIDTH, settings)))
            start += size

    def forward(self, x):
        x = x * 1.5
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1)


class Dense(nn.Module):
    """The same with dense weights."""

    def __init__(self, packed):
        super().__init__()
        for name in SIZES:
            setattr(self, name, getattr(packed, name).dequantize())

    forward = Attention.forward


@pytest.fixture(autouse=True)
def triton():
    with force_backend("triton"):
        yield


@pytest.fixture
def launches(monkeypatch):
    seen = []
    real = sab_kernels.stacked_linear

    def count(x, tensors, geometry, sizes, *rest):
        seen.append(tuple(sizes))
        return real(x, tensors, geometry, sizes, *rest)

    monkeypatch.setattr(sab_kernels, "stacked_linear", count)
    return seen


METHODS = {
    "lora on one": lambda: peft.LoraConfig(r=4, target_modules=["k"]),
    "lora on the first": lambda: peft.LoraConfig(r=4, target_modules=["q"]),
    "lora on all": lambda: peft.LoraConfig(r=4, target_modules="all-linear"),
    "dora": lambda: peft.LoraConfig(r=4, target_modules=["q", "v"], use_dora=True),
    "ia3 on outputs": lambda: peft.IA3Config(target_modules=["k", "v"], feedforward_modules=[]),
    "ia3 on inputs": lambda: peft.IA3Config(target_modules=["q"], feedforward_modules=["q"]),
    "oft": lambda: peft.OFTConfig(target_modules=["k"], oft_block_size=32),
}
CHANGES_INPUTS = ("ia3 on inputs", "oft")


def pair(method, moved):
    """Packed and grouped, and dense, with the same adapter."""
    packed = Attention()
    dense = Dense(packed)
    packed.to(DEVICE)
    for layer in packed.children():
        layer.prepare()
    assert len(group_linears(packed)) == 1
    made = []
    for model in (packed, dense):
        torch.manual_seed(0)
        made.append(moved(peft.get_peft_model(model, METHODS[method]())))
    return made


def values(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("method", METHODS)
def test_adapted_group_computes_as_dense_layers(method, launches, moved):
    packed, dense = pair(method, moved)
    for seed in range(4):  # more than a group's patience
        x = values(3, WIDTH) + seed
        torch.testing.assert_close(packed(x.to(DEVICE)).cpu(), dense(x), rtol=1e-4, atol=1e-4)
    shared = [sizes for sizes in launches if sizes == tuple(SIZES.values())]
    assert len(shared) == 4 or method in CHANGES_INPUTS


@pytest.mark.parametrize("method", METHODS)
def test_adapted_group_has_the_gradients_of_dense_layers(method, moved):
    packed, dense = pair(method, moved)
    found = []
    for model, device in ((dense, "cpu"), (packed, DEVICE)):
        x = values(3, WIDTH).to(device).requires_grad_(True)
        model(x).square().sum().backward()
        found.append([x.grad.cpu(), *(p.grad.cpu() for p in model.parameters() if p.requires_grad)])
    for wanted, own in zip(*found, strict=True):
        torch.testing.assert_close(own / wanted.abs().max(), wanted / wanted.abs().max(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("method", ["lora on one", "lora on all"])
def test_adapted_group_compiles(method, launches, moved):
    packed, dense = pair(method, moved)
    x = values(3, WIDTH)
    with torch.no_grad():
        expected = dense(x)
        packed(x.to(DEVICE))  # the group is proven
        compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
        launches.clear()
        for _ in range(2):
            torch.testing.assert_close(compiled(x.to(DEVICE)).cpu(), expected, rtol=1e-4, atol=1e-4)
    assert launches == [tuple(SIZES.values())] * 2


def test_adapter_is_switched_off_and_on_in_a_group(launches, moved):
    packed, dense = pair("lora on one", moved)
    x = values(3, WIDTH)
    with packed.disable_adapter(), dense.disable_adapter():
        torch.testing.assert_close(packed(x.to(DEVICE)).cpu(), dense(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(packed(x.to(DEVICE)).cpu(), dense(x), rtol=1e-4, atol=1e-4)
    assert launches == [tuple(SIZES.values())] * 2
