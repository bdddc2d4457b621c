"""Random packed layers for the kernels, and memory that shows what was not written.

Nothing of optimum_sab is imported before a fixture asks for it: test_compile.py runs where only torch, Triton, pytest
and the kernels are installed.
"""

import pytest
import torch

BIAS_SEED, INPUT_SEED = 1, 2


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Layer:
    """A packed layer, as stored and as the kernels read it."""

    def __init__(self, packed, device):
        from optimum_sab.ops.shape import LayerShape
        from sab_kernels import to_kernel_layout

        self.packed, self.device = packed, device
        self.rows, self.columns = packed.out_features, packed.in_features
        self.geometry = LayerShape.of(self.rows, self.columns, packed.settings).geometry
        self.tensors = {n: t.to(device) for n, t in to_kernel_layout(packed.tensors, self.geometry).items()}

    def inputs(self, tokens, dtype, seed=INPUT_SEED):
        x = torch.randn(tokens, self.columns, generator=torch.Generator().manual_seed(seed))
        return x.to(dtype).to(self.device)

    def bias(self, dtype=torch.float32):
        return torch.randn(self.rows, generator=torch.Generator().manual_seed(BIAS_SEED)).to(dtype).to(self.device)

    def expected(self, x, bias=None):
        """The reference's fp32 result."""
        from optimum_sab.ops.reference import binary_linear

        return binary_linear(x.cpu().float(), self.packed, None if bias is None else bias.cpu().float())


@pytest.fixture(scope="session")
def random_packed():
    """``random_packed(rows, columns, seed=0, **settings)``: a valid `PackedWeight` of random bits.

    Half of the row scales are negative, a tenth of them is zero and, with fp8, a fifth subnormal.
    """
    from optimum_sab.core.settings import LayerSettings
    from optimum_sab.format import random_weight
    from optimum_sab.format.layout import tensor_specs
    from optimum_sab.format.packed_weight import PackedWeight

    def build(rows, columns, seed=0, **changes):
        settings = LayerSettings(**changes)
        generator = torch.Generator().manual_seed(seed)
        specs = tensor_specs(rows, columns, settings)

        def whole(name, high):
            return torch.randint(0, high, specs[name].shape, generator=generator)

        tensors = dict(random_weight.random_packed(rows, columns, settings, seed).tensors)
        chance = torch.rand(specs["row_scale"].shape, generator=generator)
        sign = whole("row_scale", 2)
        if settings.row_scale == "fp8":
            normal = (56 - 8) + whole("row_scale", 16)  # e4m3 bits of 0.5 up to 2
            scale = torch.where(chance < 0.2, whole("row_scale", 8), normal)
            tensors["row_scale"] = (torch.where(chance > 0.9, 0, scale) | sign << 7).to(torch.uint8)
            tensors["row_exponent"] = (whole("row_exponent", 3) - 7).to(torch.int8)
        else:
            scale = (torch.rand(chance.shape, generator=generator) + 0.5) * (1 - 2 * sign) / 64
            tensors["row_scale"] = torch.where(chance > 0.9, 0.0, scale).half().view(torch.int16)
        packed = PackedWeight(tensors, rows, columns, settings)
        packed.validate()
        return packed

    return build


@pytest.fixture(scope="session")
def random_layer(random_packed, device):
    """``random_layer(rows, columns, seed=0, **settings)``: a `Layer`."""

    def build(rows, columns, seed=0, **settings):
        return Layer(random_packed(rows, columns, seed, **settings), device)

    return build


@pytest.fixture(scope="session")
def layer_of(device):
    """``layer_of(packed)``: the `Layer` of a `PackedWeight`."""
    return lambda packed: Layer(packed, device)


@pytest.fixture
def poisoned(monkeypatch):
    """`torch.empty` gives NaN, and random integers that are never the same twice."""
    empty, generator = torch.empty, torch.Generator()

    def poison(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        if tensor.dtype == torch.bool or tensor.is_complex():
            return tensor
        info = torch.iinfo(tensor.dtype)
        noise = torch.randint(max(info.min, -(2**31)), min(info.max, 2**31 - 1), tensor.shape, generator=generator)
        return tensor.copy_(noise)

    monkeypatch.setattr(torch, "empty", poison)


@pytest.fixture(scope="session")
def assert_near():
    """``assert_near(found, expected)``: one tolerance per dtype, relative to the largest expected value."""
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

    def check(found, expected):
        assert found.shape == expected.shape
        assert bool(torch.isfinite(found).all()), "an output was not written, or is not a number"
        error = float((found.cpu().double() - expected.double()).abs().max())
        largest = float(expected.double().abs().max())
        assert error <= tolerance[found.dtype] * largest, f"error {error:g} of {largest:g}"

    return check
