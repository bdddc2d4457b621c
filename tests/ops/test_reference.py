import numpy as np
import pytest
import torch

from optimum_sab.core.hessian import InputStatistics
from optimum_sab.core.settings import LayerSettings
from optimum_sab.core.solver import solve
from optimum_sab.errors import ConfigError
from optimum_sab.format.packed_weight import PackedWeight
from optimum_sab.ops.reference import binary_linear

OUT, WIDTH, BLOCK = 6, 75, 32
PLANES = [(1, 0), (1, 1), (2, 0), (2, 1)]
# One rounding of the result to the input's dtype; the sums before it are fp32's, 1e-6 of the largest output.
TOLERANCE = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def packed_weight(planes=(1, 1), row_scale="fp8", seed=0):
    settings = LayerSettings(
        block_size=BLOCK, base_planes=planes[0], residual_planes=planes[1], row_scale=row_scale, salient_fraction=0.2
    )
    weight = torch.randn(OUT, WIDTH, generator=torch.Generator().manual_seed(seed))
    hessian = torch.eye(WIDTH)
    statistics = InputStatistics(hessian, {"text": hessian}, None, {"text": WIDTH})
    return PackedWeight.pack(solve(weight, statistics, settings).planes, settings)


def random_inputs(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def naive(inputs, packed, bias=None):
    """``y[i] = b[i] + Σ_block Σ_plane a[plane, block, i] · Σ_j B[plane, i, j] · c[j] · x[j]``, in double precision."""
    planes = packed.unpack()
    base = planes.base_sign.shape[0]
    result = np.zeros((inputs.shape[0], OUT))
    for token in range(inputs.shape[0]):
        x = [float(v) * float(c) for v, c in zip(inputs[token], planes.column_scale)]
        for i in range(OUT):
            total = 0.0 if bias is None else float(bias[i])
            for p in range(base):
                for j in range(WIDTH):
                    total += float(planes.row_scale[p, j // BLOCK, i]) * (x[j] if planes.base_sign[p, i, j] else -x[j])
            for r in range(planes.residual_sign.shape[0]):
                for s, j in enumerate(planes.residual_index.tolist()):
                    sign = 1 if planes.residual_sign[r, i, s] else -1
                    total += float(planes.row_scale[base + r, j // BLOCK, i]) * sign * x[j]
            result[token, i] = total
    return result


def assert_near(found, expected, dtype):
    assert found.dtype == dtype
    np.testing.assert_allclose(
        found.double().numpy(), expected, rtol=TOLERANCE[dtype], atol=1e-6 * np.abs(expected).max()
    )


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("planes", PLANES)
def test_binary_linear_equals_the_format_s_equation(planes, dtype):
    packed, inputs = packed_weight(planes), random_inputs(4, WIDTH, dtype=dtype)
    assert_near(binary_linear(inputs, packed), naive(inputs, packed), dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_binary_linear_of_fp16_row_scales_equals_the_format_s_equation(dtype):
    packed, inputs = packed_weight(row_scale="fp16"), random_inputs(4, WIDTH, dtype=dtype)
    assert_near(binary_linear(inputs, packed), naive(inputs, packed), dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_binary_linear_adds_the_bias_in_the_input_s_dtype(dtype):
    packed, inputs, bias = packed_weight(), random_inputs(4, WIDTH, dtype=dtype), random_inputs(OUT, seed=2)
    found = binary_linear(inputs, packed, bias)
    assert found.dtype == dtype
    assert torch.equal(found, binary_linear(inputs, packed) + bias.to(dtype))
    expected = naive(inputs, packed, bias)
    np.testing.assert_allclose(
        found.double().numpy(), expected, rtol=0, atol=(4 * TOLERANCE[dtype] + 1e-6) * np.abs(expected).max()
    )


@pytest.mark.parametrize("leading", [(), (1,), (3,), (2, 3), (2, 1, 3)])
def test_binary_linear_keeps_leading_dimensions(leading):
    packed, inputs = packed_weight(), random_inputs(*leading, WIDTH)
    found = binary_linear(inputs, packed, random_inputs(OUT, seed=2))
    assert found.shape == (*leading, OUT)
    flat = binary_linear(inputs.reshape(-1, WIDTH), packed, random_inputs(OUT, seed=2))
    torch.testing.assert_close(found.reshape(-1, OUT), flat)


@pytest.mark.parametrize("leading", [(0,), (2, 0), (0, 3)])
def test_binary_linear_of_no_tokens_is_empty(leading):
    found = binary_linear(torch.zeros(*leading, WIDTH), packed_weight(), torch.zeros(OUT))
    assert found.shape == (*leading, OUT)


def test_binary_linear_accepts_inputs_that_are_not_contiguous():
    packed, inputs = packed_weight(), random_inputs(WIDTH, 8)
    for view in (inputs.T, inputs.T[::2], random_inputs(5, 2 * WIDTH)[:, ::2], random_inputs(1, WIDTH).expand(3, -1)):
        assert not view.is_contiguous()
        torch.testing.assert_close(binary_linear(view, packed), binary_linear(view.contiguous(), packed))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_binary_linear_gradient_to_the_input_is_the_dense_layer_s(dtype):
    packed, bias = packed_weight((2, 1)), random_inputs(OUT, seed=2)
    inputs = random_inputs(2, 3, WIDTH, dtype=dtype).requires_grad_()
    pull = random_inputs(2, 3, OUT, dtype=dtype, seed=3)
    binary_linear(inputs, packed, bias).backward(pull)
    reference = inputs.detach().double().requires_grad_()
    torch.nn.functional.linear(reference, packed.dequantize().double(), bias.double()).backward(pull.double())
    assert_near(inputs.grad.flatten(0, 1), reference.grad.flatten(0, 1).numpy(), dtype)


def test_binary_linear_gradient_is_that_of_its_values():
    """Central differences of a linear map are exact up to rounding."""
    packed, inputs = packed_weight(), random_inputs(1, WIDTH).requires_grad_()
    pull = random_inputs(1, OUT, seed=3)
    binary_linear(inputs, packed).backward(pull)
    for j in (0, 31, 32, 74):
        step = torch.zeros(1, WIDTH)
        step[0, j] = 1.0
        with torch.no_grad():
            change = binary_linear(inputs + step, packed) - binary_linear(inputs - step, packed)
        assert float((change * pull).sum() / 2) == pytest.approx(float(inputs.grad[0, j]), abs=1e-4)


def test_binary_linear_gives_the_bias_its_gradient():
    bias = random_inputs(OUT).requires_grad_()
    binary_linear(random_inputs(2, 3, WIDTH), packed_weight(), bias).sum().backward()
    torch.testing.assert_close(bias.grad, torch.full((OUT,), 6.0))


@pytest.mark.parametrize("width", [WIDTH - 1, WIDTH + 1, 1, 0])
def test_binary_linear_refuses_another_width(width):
    with pytest.raises(ConfigError, match=f"{width}.*{WIDTH}"):
        binary_linear(torch.zeros(3, width), packed_weight())


def test_binary_linear_refuses_a_transposed_input():
    with pytest.raises(ConfigError, match=str(WIDTH)):
        binary_linear(torch.zeros(WIDTH, 3), packed_weight())


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_binary_linear_refuses_an_input_that_is_not_floating(dtype):
    with pytest.raises(ConfigError, match=str(dtype)):
        binary_linear(torch.zeros(3, WIDTH, dtype=dtype), packed_weight())
