"""Random packed layers, and a cache of compiled kernels that ends with the session."""

import os
from functools import lru_cache

import pytest
import torch

from optimum_sab.core.settings import LayerSettings
from optimum_sab.format import random_weight
from optimum_sab.format.layout import tensor_specs
from optimum_sab.format.packed_weight import PackedWeight
from optimum_sab.ops.cpu import columns, compiler


@pytest.fixture(scope="session", autouse=True)
def kernel_cache(tmp_path_factory):
    workers = "PYTEST_XDIST_WORKER" in os.environ  # which share it: each library takes seconds
    folder = tmp_path_factory.getbasetemp().parent / "kernels" if workers else tmp_path_factory.mktemp("kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPTIMUM_SAB_CACHE", str(folder))
        for each in (columns, compiler):
            each._build.cache_clear()
        yield folder
    for each in (columns, compiler):
        each._build.cache_clear()


@pytest.fixture(scope="session")
def compiled(kernel_cache):
    """``compiled(*flags)``: the `compiler.Build` of the linears with these, asked for once: finding it in the cache
    takes a process, in which the compiler says its version."""
    return lru_cache(lambda *flags: compiler.compile_library(flags))


@pytest.fixture(scope="session")
def random_packed():
    """``random_packed(out, width, seed=0, **settings)``: a valid layer of random bits.

    A fifth of the fp8 scales is subnormal, about half of all scales are negative.
    """

    def build(out, width, seed=0, **changes):
        settings = LayerSettings(**changes)
        generator = torch.Generator().manual_seed(seed)
        specs = tensor_specs(out, width, settings)

        def bits(name, high):
            return torch.randint(0, high, specs[name].shape, generator=generator)

        tensors = dict(random_weight.random_packed(out, width, settings, seed).tensors)
        if settings.row_scale == "fp8":
            scale = bits("row_scale", 127) | bits("row_scale", 2) << 7
            small = torch.rand(scale.shape, generator=generator) < 0.2
            tensors["row_scale"] = torch.where(small, scale & 0x87, scale).to(torch.uint8)
            tensors["row_exponent"] = (bits("row_exponent", 8) - 14).to(torch.int8)
        else:
            scale = torch.randn(specs["row_scale"].shape, generator=generator)
            tensors["row_scale"] = scale.half().view(torch.int16)
        packed = PackedWeight(tensors, out, width, settings)
        packed.validate()
        return packed

    return build
