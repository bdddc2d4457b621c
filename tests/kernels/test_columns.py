"""The solver's loops over columns in Triton: what they return and the signs they leave say the same, and every level is
the nearest; against torch, column by column."""

import pytest
import torch

pytest.importorskip("triton")

SAMPLE = [((1, 1), (1, 1)), ((5, 16), (1, 0)), ((70, 37), (1, 1)), ((70, 18), (2, 1)), ((3, 17), (4, 0))]
# rows and columns of a block, ragged tiles of either; base and residual planes
BLOCKS = [
    *SAMPLE,
    *(
        pytest.param(shape, planes, marks=pytest.mark.full)
        for shape in ((5, 16), (70, 37), (130, 75))
        for planes in ((1, 0), (1, 1), (1, 3), (2, 0), (2, 1), (3, 1), (4, 0))
    ),
]


class Block:
    """A random block; its scales have either sign, one row's are zero, and one column is dead."""

    def __init__(self, rows, width, planes, device, seed=0):
        from optimum_sab.core.factorization import factor_hessian
        from optimum_sab.core.feedback import LevelPicker
        from sab_kernels.columns import Levels

        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(2 * width + 2, width, generator=generator)
        factored = factor_hessian((inputs.T @ inputs / width).to(device), 0.1)
        self.H, self.U = factored.hessian, factored.inverse_factor.contiguous()
        self.base, self.planes, self.shape = planes[0], sum(planes), (rows, width)
        self.weight = torch.randn(rows, width, generator=generator).to(device)
        self.row_scale = torch.randn(self.planes, rows, generator=generator).to(device)
        self.row_scale[:, rows // 2] = 0.0
        self.column_scale = (torch.rand(width, generator=generator) + 0.5).to(device)
        self.column_scale[width // 2] = 0.0
        self.salient = ((torch.arange(width) % 5 == 1) & torch.tensor(bool(planes[1]))).to(device)
        self.picker = LevelPicker(self.row_scale, self.base)
        self.levels = Levels(
            self.row_scale[0],
            self.picker.levels[self.base],
            self.picker.levels[self.planes],
            self.column_scale,
            self.salient,
        )
        self.signs = torch.full((self.planes, rows, width), 7.0, device=device)

    def value(self, signs=None):
        """Q of the signs, where columns have the planes."""
        signs = (self.signs if signs is None else signs).clone()
        signs[self.base :, :, ~self.salient] = 0.0
        return (signs * self.row_scale[:, :, None]).sum(0) * self.column_scale

    def distance_to_levels(self, wanted):
        """To the nearest of what every entry may become."""
        found = torch.empty_like(wanted)
        for j in range(self.shape[1]):
            levels = self.picker.levels[self.planes if self.salient[j] else self.base] * self.column_scale[j]
            found[:, j] = (levels - wanted[:, j]).abs().amin(0)
        return found


@pytest.mark.parametrize(("shape", "planes"), BLOCKS)
def test_feedback_takes_the_nearest_level_to_what_earlier_errors_leave(shape, planes, device):
    from sab_kernels.columns import feed_back

    block = Block(*shape, planes, device)
    errors = feed_back(block.weight, tuple(block.signs), block.levels, block.U, block.base)
    assert block.signs[: block.base].abs().eq(1).all()
    residual = block.signs[block.base :]
    assert residual[:, :, block.salient].abs().eq(1).all()
    assert residual[:, :, ~block.salient].eq(7).all()  # where a column has no such plane nothing is written
    value = block.value()
    torch.testing.assert_close(block.weight - value, errors @ block.U, rtol=1e-4, atol=1e-4)
    wanted = value + errors * block.U.diagonal()
    torch.testing.assert_close((wanted - value).abs(), block.distance_to_levels(wanted), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("shape", "planes"), BLOCKS)
def test_a_descent_is_that_of_torch(shape, planes, device):
    """Apart from entries where two levels are as near, of which random blocks have none."""
    from optimum_sab.core.descent import SweptBlock, sweep_block
    from optimum_sab.core.planes import WeightFit
    from optimum_sab.core.settings import LayerSettings
    from sab_kernels.columns import descend

    block = Block(*shape, planes, device, seed=1)
    signs = torch.randn(block.signs.shape, generator=torch.Generator().manual_seed(2)).to(device)
    block.signs = signs.sign()
    block.signs[block.base :, :, ~block.salient] = 0.0
    value = block.value()
    error = block.weight - value
    settings = LayerSettings(block_size=96, base_planes=planes[0], residual_planes=planes[1])
    scale = block.row_scale[:, None]
    expected = WeightFit(list(block.signs.clone()), block.salient, scale, block.column_scale, settings)
    rest = error.clone()
    sweep_block(SweptBlock(expected, 0, error @ block.H, value, rest, block.H))
    gradient = error @ block.H
    fallen = descend(gradient, value, tuple(block.signs), block.levels, block.H, block.base)
    torch.testing.assert_close(block.value(), value - fallen, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(error + fallen, rest, rtol=1e-4, atol=1e-4)
    assert torch.equal(block.signs, torch.stack(expected.signs))


def test_signs_may_be_columns_of_wider_planes(device):
    from sab_kernels.columns import feed_back

    block = Block(70, 37, (2, 1), device)
    whole = torch.full((3, 70, 50), 7.0, device=device)
    errors = feed_back(block.weight, tuple(whole[:, :, 9:46]), block.levels, block.U, block.base)
    again = feed_back(block.weight, tuple(block.signs), block.levels, block.U, block.base)
    assert torch.equal(errors, again) and torch.equal(whole[:, :, 9:46], block.signs)
    assert whole[:, :, :9].eq(7).all() and whole[:, :, 46:].eq(7).all()


def test_what_is_given_is_not_changed_but_for_the_signs(device):
    from sab_kernels.columns import descend, feed_back

    block = Block(40, 33, (1, 1), device)
    given = [block.weight, block.U, block.H, *block.levels]
    before = [each.clone() for each in given]
    feed_back(block.weight, tuple(block.signs), block.levels, block.U, block.base)
    value, gradient = block.value(), block.weight @ block.H
    kept = value.clone(), gradient.clone()
    descend(gradient, value, tuple(block.signs), block.levels, block.H, block.base)
    assert all(map(torch.equal, (*given, value, gradient), (*before, *kept)))


class Blocks:
    """Random blocks of one shape as a stack, their signs columns of wider planes; salient columns differ."""

    def __init__(self, shape, planes, device):
        self.each = [Block(*shape, planes, device, seed) for seed in (3, 4, 5)]
        for number, block in enumerate(self.each):
            block.salient.copy_(block.salient.roll(number))
        self.levels = type(self.each[0].levels)(*(torch.stack(all_) for all_ in zip(*(b.levels for b in self.each))))
        (rows, width), count = shape, sum(planes)
        self.whole = torch.full((count, 3, rows, width + 13), 7.0, device=device)
        self.signs = tuple(self.whole[..., 9 : 9 + width])

    def stacked(self, name):
        return torch.stack([getattr(block, name) for block in self.each])


@pytest.mark.parametrize(("shape", "planes"), SAMPLE)
def test_weights_of_a_stack_are_each_what_they_are_alone(shape, planes, device):
    from sab_kernels.columns import descend, feed_back

    blocks = Blocks(shape, planes, device)
    base, width = planes[0], shape[1]
    errors = feed_back(blocks.stacked("weight"), blocks.signs, blocks.levels, blocks.stacked("U"), base)
    for number, block in enumerate(blocks.each):
        alone = feed_back(block.weight, tuple(block.signs), block.levels, block.U, base)
        torch.testing.assert_close(errors[number], alone, rtol=1e-5, atol=1e-6)
        assert torch.equal(torch.stack([sign[number] for sign in blocks.signs]), block.signs)
    value = torch.stack([block.value() for block in blocks.each])
    gradient = torch.stack([block.weight @ block.H for block in blocks.each])
    fallen = descend(gradient, value, blocks.signs, blocks.levels, blocks.stacked("H"), base)
    for number, block in enumerate(blocks.each):
        alone = descend(gradient[number], value[number], tuple(block.signs), block.levels, block.H, base)
        torch.testing.assert_close(fallen[number], alone, rtol=1e-5, atol=1e-6)
        assert torch.equal(torch.stack([sign[number] for sign in blocks.signs]), block.signs)
    assert blocks.whole[..., :9].eq(7).all() and blocks.whole[..., 9 + width :].eq(7).all()


@pytest.mark.parametrize("function", ["feed_back", "descend"])
def test_a_stack_takes_the_launches_of_one_weight(function, device, monkeypatch):
    from sab_kernels import columns

    blocks, grids = Blocks((70, 37), (1, 1), device), []

    class Launches:
        def __getitem__(self, grid):
            grids.append(grid)
            return columns_kernel[grid]

    columns_kernel = columns.column_kernel
    monkeypatch.setattr(columns, "column_kernel", Launches())
    given = (blocks.signs, blocks.levels, blocks.stacked("U" if function == "feed_back" else "H"), 1)
    if function == "descend":
        given = (blocks.stacked("weight"), *given)
    getattr(columns, function)(blocks.stacked("weight"), *given)
    assert grids == [(2, 3)] * 3  # sixteen columns each
