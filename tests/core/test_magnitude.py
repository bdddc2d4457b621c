"""Weights of any magnitude are solved as those of an ordinary one are, or refused by name."""

import pytest
import torch

from optimum_sab.core.hessian import InputMoments
from optimum_sab.core.magnitude import check_magnitude, extreme_power
from optimum_sab.core.settings import LayerSettings
from optimum_sab.core.solver import solve
from optimum_sab.errors import ConfigError, NonFiniteError
from optimum_sab.format.packed_weight import PackedWeight

SETTINGS = LayerSettings(block_size=32, iterations=3)


def times(tensor, power):
    return (tensor.double() * 2.0**power).float()


@pytest.fixture
def layer(correlated_inputs):
    """A weight, and statistics of its inputs with a dense stream, a residual and halves, all times 2^power."""
    weight = torch.randn(24, 80, generator=torch.Generator().manual_seed(1)) * 0.7

    def make(power=0):
        moments = [InputMoments(80, torch.device("cpu"), True, "it") for _ in range(2)]
        for index, half in enumerate(moments):
            x = correlated_inputs(150, 80, seed=index)
            drifted, residual = x + 0.3 * x.roll(1, 1), 0.2 * x[:, :24]  # the same in both halves: it is believed
            half.add("text", x, drifted, times(residual, power))
        return times(weight, power), moments[0].statistics("balanced", moments[1])

    return make


@pytest.mark.parametrize("power", [99, -99, 110, -110, 41])
def test_solve_of_an_extreme_weight_is_that_of_an_ordinary_one(layer, power):
    plain, found = (solve(*layer(each), SETTINGS) for each in (0, power))
    assert plain.propagation > 0 and plain.planes.row_scale.abs().max() > 0.1
    assert torch.equal(found.planes.base_sign, plain.planes.base_sign)
    assert torch.equal(found.planes.residual_sign, plain.planes.residual_sign)
    assert torch.equal(found.planes.row_scale, times(plain.planes.row_scale, power))
    assert torch.equal(found.planes.column_scale, plain.planes.column_scale)
    assert (found.error, found.propagation) == (plain.error, plain.propagation)
    packed = PackedWeight.pack(found.planes, SETTINGS)
    assert torch.equal(packed.dequantize(), times(plain.planes.dequantize(), power))


def test_solve_of_weights_of_1e30_is_right(layer):
    weight, statistics = layer()
    found = solve(weight * 1e30, statistics, SETTINGS.replace(propagation=0.0))
    plain = solve(weight, statistics, SETTINGS.replace(propagation=0.0))
    assert found.error == pytest.approx(plain.error, rel=0.05)
    assert 0 < found.error < 0.5


@pytest.mark.parametrize(
    ("value", "storage", "remedy"),
    [
        (1e-42, "fp8", "use modules_to_not_convert=['the.layer']"),
        (1e-10, "fp16", "use row_scale='fp8', or modules_to_not_convert=['the.layer']"),
        (1e6, "fp16", "use row_scale='fp8', or modules_to_not_convert=['the.layer']"),
        (3.2e38, "fp8", "use modules_to_not_convert=['the.layer']"),
        (1e-42, "fp16", "use modules_to_not_convert=['the.layer']"),
    ],
)
def test_solve_refuses_what_its_scales_cannot_hold_and_says_what_can(layer, value, storage, remedy):
    _, statistics = layer()
    with pytest.raises(ConfigError) as caught:
        solve(torch.full((24, 80), value), statistics, SETTINGS.replace(row_scale=storage), "the.layer")
    assert str(caught.value).startswith(f"the weight of the.layer has a magnitude of {value:.2g}, and")
    assert remedy in str(caught.value)


@pytest.mark.parametrize("storage", ["fp8", "fp16"])
@pytest.mark.parametrize("value", [0.0, 1e-5, 1e-2, 100.0])
def test_ordinary_weights_and_zero_are_taken(value, storage):
    weight = torch.zeros(3, 40)
    weight[1] = value
    check_magnitude(weight, storage, "it")
    check_magnitude(weight.bfloat16(), storage, "it")


def test_small_rows_beside_ordinary_ones_are_taken():
    weight = torch.full((3, 40), 1e-12)
    weight[1] = 0.01
    check_magnitude(weight, "fp16", "it")


def test_a_sum_that_overflows_is_not_taken_for_a_weight_that_does():
    check_magnitude(torch.full((2, 4096), 1e36), "fp8", "it")
    with pytest.raises(NonFiniteError, match="the weight of it holds NaN or inf"):
        check_magnitude(torch.tensor([[1.0, float("inf")]]), "fp8", "it")


@pytest.mark.parametrize(
    ("value", "power"), [(0.0, 0), (1.0, 0), (2.0**39, 0), (2.0**40, 41), (2.0**-42, -41), (1e30, 100)]
)
def test_only_extreme_weights_are_rescaled(value, power):
    assert extreme_power(torch.tensor([[value, 0.0]])) == power
