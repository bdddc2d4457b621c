import itertools

import pytest
import torch

from optimum_sab.core.code import TRELLIS16, Code
from optimum_sab.core.coded import coded_values
from optimum_sab.core.trellis import AT_ONCE, Ends, Levels, search_bits

EIGHT = Code("8", (0b1011, 0b0100))


def random_problem(rows, width, free=(), blocks=1, seed=0):
    """Target, damped H, U and levels with free planes on the columns that ``free`` lists for each plane."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(rows, width, generator=generator)
    inputs = torch.randn(4 * width, width, generator=generator) @ torch.randn(width, width, generator=generator)
    hessian = inputs.T @ inputs / inputs.shape[0]
    hessian += 0.1 * hessian.diagonal().mean() * torch.eye(width)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian.double()), upper=True).float()
    scale = torch.rand(1 + len(free), blocks, rows, generator=generator) + 0.2
    scale[-1, :, ::2] *= -1.0  # refitted scales may be negative
    block = torch.arange(width) * blocks // width
    count = torch.zeros(width, dtype=torch.int64)
    for columns in free:
        count[columns] += 1
    return target, hessian, factor, Levels(scale, torch.rand(width, generator=generator) + 0.5, block, count)


def weight_of(bits, levels, code, before=None):
    """The weight that found bits stand for."""
    memory = code.memory
    before = torch.zeros(len(bits), memory, dtype=torch.bool) if before is None else before
    planes = [coded_values(code, torch.cat([before, (bits & 1).bool()], 1))[:, memory:]]
    for f in range(levels.row_scale.shape[0] - 1):
        planes.append(((bits >> (1 + f) & 1).float() * 2 - 1) * (levels.free > f))
    dense = sum(plane * scale[levels.block].T for plane, scale in zip(planes, levels.row_scale, strict=True))
    return dense * levels.column_scale


def error_of(target, hessian, weight):
    difference = (target - weight).double()
    return ((difference @ hessian.double()) * difference).sum(1)


@pytest.mark.parametrize("free", [(), (range(9),), (range(9), [1, 4, 8])], ids=["none", "one", "two"])
def test_without_correlation_nothing_is_better(free):
    target, _, _, levels = random_problem(4, 9, [torch.tensor(list(f)) for f in free])
    target, levels = (target[:, :7], levels.columns(0, 7)) if free else (target, levels)
    width = target.shape[1]
    alone = torch.eye(width)
    found = error_of(target, alone, weight_of(search_bits(target, alone, levels, EIGHT), levels, EIGHT))
    most = 1 + int(levels.free.max())
    # all stored bits; free signs are best entry by entry, since nothing else depends on them
    least = torch.full((4,), float("inf"), dtype=torch.float64)
    for stored in itertools.product((0, 1), repeat=width):
        row = torch.tensor(stored, dtype=torch.uint8).expand(4, width)
        entries = []
        for signs in itertools.product((0, 1), repeat=most - 1):
            extra = sum(sign << (1 + f) for f, sign in enumerate(signs))
            entries.append((target - weight_of(row + extra, levels, EIGHT)).double().square())
        least = torch.minimum(least, torch.stack(entries).amin(0).sum(1))
    torch.testing.assert_close(found, least, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("width", [AT_ONCE, AT_ONCE + 40])  # all held, and settled on the way
def test_correlated_columns_are_found_better_than_by_feedback_alone(width):
    target, hessian, factor, levels = random_problem(4, width, blocks=2)
    found = error_of(target, hessian, weight_of(search_bits(target, factor, levels, TRELLIS16), levels, TRELLIS16))
    rest, taken = target.clone(), torch.zeros_like(target)
    for j in range(width):  # plain signs with the same energy, column by column
        scale = levels.column_scale[j] * levels.row_scale[0, levels.block[j]].abs() * 1.25**0.5
        taken[:, j] = torch.where(rest[:, j] >= 0, scale, -scale)
        rest[:, j:] -= ((rest[:, j] - taken[:, j]) / factor[j, j])[:, None] * factor[j, j:]
    assert float(found.sum()) < 0.95 * float(error_of(target, hessian, taken).sum())


def test_fixed_ends_are_kept():
    target, hessian, factor, levels = random_problem(6, 40)
    generator = torch.Generator().manual_seed(1)
    before, after = (torch.rand(6, 4, generator=generator) > 0.5 for _ in range(2))
    bits = search_bits(target, factor, levels, TRELLIS16, Ends(before, after))
    assert torch.equal(bits[:, -4:] & 1, after.to(torch.uint8))
    with_ends = error_of(target, hessian, weight_of(bits, levels, TRELLIS16, before))
    without = search_bits(target, factor, levels, TRELLIS16)
    without = (without & 0xFE) | torch.cat([without[:, :-4] & 1, after.to(torch.uint8)], 1)
    least = error_of(target, hessian, weight_of(without, levels, TRELLIS16, before))
    assert float(with_ends.sum()) < float(least.sum())


def test_rows_searched_apart_are_the_same(monkeypatch):
    target, _, factor, levels = random_problem(7, 30, [torch.arange(0, 30, 3)])
    whole = search_bits(target, factor, levels, TRELLIS16)
    monkeypatch.setattr("optimum_sab.core.trellis.CHOICE_BYTES", 2 * 30 * 16)
    assert torch.equal(search_bits(target, factor, levels, TRELLIS16), whole)
