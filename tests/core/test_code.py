import itertools

import pytest
import torch

from optimum_sab.core.code import CODES, TRELLIS16, TRELLIS16X2, Code, find_code
from optimum_sab.core.planes import BinaryPlanes
from optimum_sab.core.settings import LayerSettings
from optimum_sab.errors import ConfigError


def parity(stored, row, column, tap):
    """By the definition, entry by entry."""
    return sum(int(stored[row, column - k]) for k in range(column + 1) if tap >> k & 1) % 2


def test_codes_mean_for_ever_what_the_format_says():
    assert TRELLIS16.taps == (0b10011, 0b00100)
    assert (TRELLIS16.memory, TRELLIS16.states, TRELLIS16.parts) == (4, 16, (1.0, 0.5))
    assert TRELLIS16X2.taps == (0b11001, 0b10111)
    assert (TRELLIS16X2.memory, TRELLIS16X2.states, TRELLIS16X2.parts) == (4, 16, (1.0, 0.5))
    assert list(CODES) == ["trellis16", "trellis16x2"]


@pytest.mark.parametrize(
    "code", [TRELLIS16, TRELLIS16X2, Code("other", (0b11, 0b1, 0b101))], ids=lambda code: code.name
)
@pytest.mark.parametrize("width", [1, 3, 40])
def test_derived_planes_are_parities_of_earlier_bits(code, width):
    stored = torch.rand(3, width, generator=torch.Generator().manual_seed(width)) < 0.5
    for plane, tap in zip(code.planes(stored), code.taps, strict=True):
        for i, j in itertools.product(range(3), range(width)):
            assert bool(plane[i, j]) == bool(parity(stored, i, j, tap))


def test_a_coded_plane_takes_four_levels():
    stored = torch.rand(2, 400, generator=torch.Generator().manual_seed(0)) < 0.5
    scale = torch.tensor([[[2.0, 3.0]], [[0.25, 1.0]]])
    free = torch.zeros(2, 400, dtype=torch.bool)
    no_residual, no_column = torch.zeros(0, 2, 0, dtype=torch.bool), torch.zeros(0, dtype=torch.int64)
    planes = BinaryPlanes(torch.stack([stored, free]), no_residual, no_column, scale, torch.ones(400), 512, "trellis16")
    dense = planes.dequantize()
    assert sorted(dense[0].unique().tolist()) == [-3.25, -1.25, 0.75, 2.75]  # ±3, ±1 times half of 2, and −1/4
    first, second = TRELLIS16.planes(stored)
    assert torch.equal(dense[1], 3.0 * (2.0 * first[1] - 1) + 1.5 * (2.0 * second[1] - 1) - 1.0)
    parts = planes.split([1, 1])
    assert torch.equal(torch.cat([part.dequantize() for part in parts]), dense)


@pytest.mark.parametrize("name", ["magic", "TRELLIS16", "", None, 16, ["trellis16"]])
def test_unknown_code_is_named(name):
    with pytest.raises(ConfigError, match="code="):
        find_code(name)
    with pytest.raises(ConfigError, match="code="):
        LayerSettings(code=name)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"block_size": 64}, "block_size=64"),
        ({"base_planes": 3}, "base_planes=3"),
        ({"residual_planes": 3}, "residual_planes=3"),
        ({"refit": False, "sweeps": 0}, "refit"),
        ({"feedback": "block"}, "feedback"),
    ],
)
def test_what_a_code_does_not_go_with_is_named(changes, named):
    with pytest.raises(ConfigError, match=named):
        LayerSettings(code="trellis16", **changes)
    LayerSettings(**changes)


def test_computed_planes_count_the_derived_ones():
    assert LayerSettings().computed_planes == 2
    assert LayerSettings(code="trellis16").computed_planes == 3
    assert LayerSettings(code="trellis16").planes == 2
