"""Trainable scales: what is trained is what is stored, and gradients are those of the plain formula."""

import pytest
import torch

from optimum_sab.calibration.refine.scales import TrainableScales, power_of_two
from optimum_sab.core.settings import LayerSettings
from optimum_sab.format.packed_weight import PackedWeight
from optimum_sab.format.random_weight import random_packed

SETTINGS = {
    "default": LayerSettings(block_size=32),
    "two planes, fp16": LayerSettings(block_size=64, base_planes=2, residual_planes=2, row_scale="fp16"),
    "no residual": LayerSettings(block_size=32, residual_planes=0),
}


@pytest.fixture(params=SETTINGS)
def packed(request) -> PackedWeight:
    return random_packed(24, 80, SETTINGS[request.param])


def trainable(packed):
    return TrainableScales(packed, torch.device("cpu"))


def same(one, other):
    return one.tensors.keys() == other.tensors.keys() and all(
        torch.equal(t, other.tensors[name]) for name, t in one.tensors.items()
    )


def shake(scales, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in scales.tensors:
            tensor.mul_(1 + 0.2 * torch.randn(tensor.shape, generator=generator))


def test_start_is_the_packed_weight(packed):
    scales = trainable(packed)
    assert torch.equal(scales.weight(), packed.dequantize())
    assert same(scales.packed(), packed)


def test_what_is_trained_is_what_is_stored(packed):
    scales = trainable(packed)
    shake(scales)
    stored = scales.packed()
    assert not torch.equal(stored.dequantize(), packed.dequantize())
    assert torch.equal(scales.weight(), stored.dequantize())


def held_bytes(thing):
    """Bytes of all tensors an object refers to, each once."""
    seen = {}

    def walk(each):
        if isinstance(each, torch.Tensor):
            seen[each.data_ptr()] = each.numel() * each.element_size()
        elif isinstance(each, (list, tuple)):
            [walk(inner) for inner in each]
        elif isinstance(each, dict):
            [walk(inner) for inner in each.values()]
        elif hasattr(each, "__dict__"):
            walk(vars(each))

    walk(thing)
    return sum(seen.values())


def test_signs_are_held_packed():
    packed = random_packed(256, 512, SETTINGS["two planes, fp16"])
    signs = sum(
        packed.tensors[name].numel() * packed.tensors[name].element_size() for name in ("weight", "residual_sign")
    )
    free = sum(t.numel() * 4 for t in trainable(packed).tensors)
    assert signs > 2 * 256 * 512 / 8
    assert held_bytes(trainable(packed)) < packed.stored_bytes + 1.2 * free + 512


def test_signs_stay(packed):
    scales = trainable(packed)
    shake(scales)
    for name in ("weight", "residual_sign", "residual_index"):
        if name in packed.tensors:
            assert torch.equal(scales.packed().tensors[name], packed.tensors[name])


def test_gradients_are_those_of_the_planes_sum(packed):
    scales = trainable(packed)
    planes = packed.unpack()
    pull = torch.randn(24, 80, generator=torch.Generator().manual_seed(1))
    (scales.weight() * pull).sum().backward()

    row, column = planes.row_scale.clone().requires_grad_(), planes.column_scale.clone().requires_grad_()
    block = torch.arange(80) // planes.block_size
    dense = sum((s.float() * 2 - 1) * row[p].T[:, block] for p, s in enumerate(planes.base_sign))
    for r, sign in enumerate(planes.residual_sign):
        wide = torch.zeros(24, 80)
        wide[:, planes.residual_index] = sign.float() * 2 - 1
        dense = dense + wide * row[len(planes.base_sign) + r].T[:, block]
    (dense * column * pull).sum().backward()
    unit = power_of_two(planes.row_scale[:1].square().mean((0, 1), keepdim=True).sqrt())
    torch.testing.assert_close(scales.row.grad / unit, row.grad)
    torch.testing.assert_close(scales.column.grad, column.grad)


def test_dead_columns_stay_zero():
    packed = random_packed(24, 80, SETTINGS["default"])
    packed.tensors["col_scale"][[3, 70]] = 0
    scales = trainable(packed)
    scales.weight().sum().backward()
    assert not scales.column.grad[[3, 70]].any()
    with torch.no_grad():
        scales.column.add_(1.0)
    assert torch.equal((scales.packed().column_scale() == 0).nonzero()[:, 0], torch.tensor([3, 70]))


def test_power_of_two_is_near_and_exact():
    size = torch.tensor([0.0, 1.0, 0.3, 1e-6, 700.0])
    unit = power_of_two(size)
    assert torch.equal(torch.frexp(unit).mantissa, torch.full((5,), 0.5))
    assert float(unit[0]) == 1.0
    assert bool(((size[1:] / unit[1:]) > 0.7).all() and ((size[1:] / unit[1:]) < 1.42).all())
