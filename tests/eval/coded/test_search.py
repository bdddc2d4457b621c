import itertools

import pytest
import torch

from optimum_sab.errors import ConfigError
from optimum_sab.eval.coded.code import CODES, find_code
from optimum_sab.eval.coded.gaussian import gaussian_loss, main
from optimum_sab.eval.coded.search import Ends, Levels, search_bits


def random_problem(rows, width, code, free=(), blocks=1, seed=0):
    """Target, damped H, U and levels with free planes on the columns that ``free`` lists for each plane."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(rows, width, generator=generator)
    inputs = torch.randn(4 * width, width, generator=generator) @ torch.randn(width, width, generator=generator)
    hessian = inputs.T @ inputs / inputs.shape[0]
    hessian += 0.1 * hessian.diagonal().mean() * torch.eye(width)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian.double()), upper=True).float()
    scale = torch.rand(len(code.taps) + len(free), blocks, rows, generator=generator) + 0.2
    scale[-1, :, ::2] *= -1.0  # refitted scales may be negative
    block = torch.arange(width) * blocks // width
    count = torch.zeros(width)
    for columns in free:
        count[columns] += 1
    return target, hessian, factor, Levels(scale, torch.rand(width, generator=generator) + 0.5, block, count)


def weight_of(bits, levels, code, before=None):
    """By the definition, entry by entry."""
    rows, width = bits.shape
    memory = code.memory
    stored = torch.nn.functional.pad(bits & 1, (memory, 0))
    if before is not None:
        stored[:, :memory] = before
    found = torch.zeros(rows, width)
    for i, j in itertools.product(range(rows), range(width)):
        total = 0.0
        for q, tap in enumerate(code.taps):
            parity = sum(int(stored[i, memory + j - k]) for k in range(memory + 1) if tap >> k & 1) % 2
            total += (2 * parity - 1) * levels.row_scale[q, levels.block[j], i]
        for f in range(int(levels.free[j])):
            sign = 2 * int(bits[i, j] >> (1 + f) & 1) - 1
            total += sign * levels.row_scale[len(code.taps) + f, levels.block[j], i]
        found[i, j] = total * levels.column_scale[j]
    return found


def error_of(target, hessian, weight):
    difference = (target - weight).double()
    return ((difference @ hessian.double()) * difference).sum(1)


@pytest.mark.parametrize("name", [*CODES, "taps:11:4:6"])
def test_planes_of_the_found_bits_have_the_error_that_the_search_tells(name):
    code = find_code(name)
    target, hessian, factor, levels = random_problem(3, 150, code, [torch.arange(0, 150, 3)], blocks=2)
    found = search_bits(target, factor, levels, code)
    weight = weight_of(found.bits, levels, code)
    torch.testing.assert_close(found.error, error_of(target, hessian, weight), rtol=1e-3, atol=0)
    planes = [*code.planes((found.bits & 1).bool()), (found.bits >> 1 & 1).float() * 2 - 1]
    planes[-1] *= levels.free
    dense = sum(plane * scale[levels.block].T for plane, scale in zip(planes, levels.row_scale, strict=True))
    torch.testing.assert_close(dense * levels.column_scale, weight)


@pytest.mark.parametrize("free", [(), (range(9),), (range(9), [1, 4, 8])])
def test_without_correlation_nothing_is_better(free):
    code = find_code("8")
    target, _, _, levels = random_problem(4, 9, code, [torch.tensor(list(f)) for f in free])
    target, levels = (target[:, :7], levels.columns(0, 7)) if free else (target, levels)
    width = target.shape[1]
    found = search_bits(target, torch.eye(width), levels, code)
    most = 1 + int(levels.free.max())
    # all stored bits; free signs are best entry by entry, since nothing else depends on them
    least = torch.full((4,), float("inf"), dtype=torch.float64)
    for stored in itertools.product((0, 1), repeat=width):
        row = torch.tensor(stored, dtype=torch.uint8).expand(4, width)
        entries = []
        for signs in itertools.product((0, 1), repeat=most - 1):
            extra = sum(sign << (1 + f) for f, sign in enumerate(signs))
            entries.append((target - weight_of(row + extra, levels, code)).double().square())
        least = torch.minimum(least, torch.stack(entries).amin(0).sum(1))
    torch.testing.assert_close(found.error, least, rtol=1e-4, atol=1e-6)


def test_fixed_ends_are_kept():
    code = find_code("16")
    target, hessian, factor, levels = random_problem(6, 40, code)
    generator = torch.Generator().manual_seed(1)
    before, after = (torch.rand(6, code.memory, generator=generator) > 0.5 for _ in range(2))
    found = search_bits(target, factor, levels, code, Ends(before, after))
    assert torch.equal(found.bits[:, -code.memory :] & 1, after.to(torch.uint8))
    weight = weight_of(found.bits, levels, code, before)
    torch.testing.assert_close(found.error, error_of(target, hessian, weight), rtol=1e-3, atol=0)


def test_more_states_lose_less_of_a_gaussian():
    losses = [gaussian_loss(name, columns=512)[0] for name in ("4", "8", "16", "64")]
    assert losses == sorted(losses, reverse=True)
    assert losses[2] == pytest.approx(0.30, abs=0.01)  # a sign loses 0.363, no code less than 0.25
    assert gaussian_loss("8", free=1, columns=512)[0] < 0.1  # two signs: 0.1175


def test_command_prints_a_line_for_each_code(capsys):
    assert main(["--codes", "8", "taps:5:2", "--columns", "128"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize("name", ["magic", "taps:", "taps:0:3", "taps:200:3", "taps:1:2:3:4", "7"])
def test_unknown_code_is_named(name):
    with pytest.raises(ConfigError, match=f"code {name!r}"):
        find_code(name)
