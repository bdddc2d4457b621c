"""The kernel for Arm, compiled by a cross compiler and run by an emulator: its products are those of portable code."""

import platform
import shutil
import struct
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

from optimum_sab.format.packed_weight import PackedWeight
from optimum_sab.ops.cpu import compiler, kernel, layer
from optimum_sab.ops.shape import LayerShape

CROSS = shutil.which("aarch64-linux-gnu-gcc")
EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
PACKAGES = "gcc-aarch64-linux-gnu, libc6-dev-arm64-cross and qemu-user-static"
needs_cross = pytest.mark.skipif(CROSS is None, reason=f"needs a cross compiler for Arm ({PACKAGES})")
needs_emulator = pytest.mark.skipif(CROSS is None or EMULATOR is None, reason=f"needs an Arm to emulate ({PACKAGES})")
SOURCES = Path(compiler.__file__).parent
PORTABLE, DOTS = ("-DSAB_PATH=0",), ("-DSAB_PATH=0", "-DSAB_DOTS=1")
MACHINES = {"dot products": ("armv8.2-a+dotprod", 1), "none": ("armv8-a", 0)}
KINDS = [  # out, in, settings: rows and columns that end inside of strips, words, bytes and blocks
    (70, 300, {}),
    (16, 31, {"block_size": 32, "residual_planes": 0}),
    (1, 1, {"block_size": 32, "salient_fraction": 5 / 32}),
    (33, 257, {"block_size": 96, "base_planes": 2, "row_scale": "fp16"}),
    (18, 1100, {"block_size": 128, "salient_fraction": 11 / 128, "residual_planes": 2}),
    (40, 700, {"block_size": 512, "base_planes": 2}),
    (47, 300, {"code": "trellis16", "block_size": 128}),
    (16, 1033, {"code": "trellis16", "base_planes": 2, "row_scale": "fp16"}),
    (33, 700, {"code": "trellis16x2", "base_planes": 2, "block_size": 128}),
]


@dataclass(frozen=True)
class Product:
    """One call of the kernel; `threads` are the emulated machine's."""

    packed: PackedWeight
    x: torch.Tensor
    bias: torch.Tensor | None
    threads: int

    def call(self):
        """As this machine's library computes it."""
        return kernel.linear(self.x, self.packed, self.bias)

    def written(self):
        """For products.c."""
        packed = self.packed
        shape = LayerShape.of(packed.out_features, packed.in_features, packed.settings)
        tensors = [packed.tensors[name] for name in shape.names]
        told = layer.describe(tensors, shape)
        sizes = [getattr(told, name) for name, _ in layer.Layer._fields_[6:]]
        numbers = [*sizes, self.x.shape[0], kernel.DTYPES[self.x.dtype], self.threads]
        stored = [packed.tensors.get(name) for name, _ in layer.Layer._fields_[:6]]
        return struct.pack("<12q", *numbers) + b"".join(map(_array, (*stored, self.x, self.bias)))


def _array(tensor):
    contents = b"" if tensor is None else tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return struct.pack("<q", len(contents)) + contents


@pytest.fixture(scope="module")
def products(random_packed):
    """All kinds in all dtypes, for tokens that take every loop; with outliers, and an input that is not finite."""
    found = []
    for seed, (rows, width, settings) in enumerate(KINDS):
        packed = random_packed(rows, width, seed, **settings)
        for tokens in (1, 2, 3, 35):
            generator = torch.Generator().manual_seed(seed)
            x = torch.randn(tokens, width, generator=generator)
            x[:, ::9] *= 1000  # alone among eight, it is nearly as large as integers of 16 bits are
            if tokens == 3:
                x[1, width // 2] = float("inf")
            bias = torch.randn(rows, generator=generator) if tokens % 2 else None
            for dtype in kernel.DTYPES:
                own = None if bias is None else bias.to(dtype)
                found.append(Product(packed, x.to(dtype), own, threads=1 + tokens % 3))
    return found


@pytest.fixture
def computed(products, monkeypatch):
    """``computed(flags, kind)``: the products of this machine's library of these flags."""
    never = {key: dict.fromkeys(kernel.DTYPES, 2**62) for key in kernel._DENSE_FROM}
    monkeypatch.setattr(kernel, "_DENSE_FROM", never)

    def compute(flags, path, dots):
        build = compiler.compile_library(flags)
        if build.library is None or build.library.sab_path() != path:
            pytest.skip(f"no such path here: {build.reason}")
        assert build.library.sab_dots() == dots
        monkeypatch.setattr(kernel, "load_library", lambda: build.library)
        return [product.call() for product in products]

    return compute


@cache
def cross_compiled(folder, march):
    program = folder / march
    flags = [flag for flag in compiler.FLAGS if flag != "-fPIC"]
    command = [CROSS, *flags, f"-march={march}", "-static", "-I", str(SOURCES)]
    source = Path(__file__).with_name("products.c")
    subprocess.run([*command, str(source), "-o", str(program), "-lm"], check=True, timeout=600)
    return program


@needs_emulator
@pytest.mark.parametrize("machine", MACHINES)
def test_products_of_an_arm_have_the_bits_of_portable_code(machine, products, computed, tmp_path_factory):
    march, dots = MACHINES[machine]
    program = cross_compiled(tmp_path_factory.mktemp("arm"), march)
    given = b"".join(product.written() for product in products)
    run = subprocess.run([EMULATOR, str(program)], input=given, capture_output=True, check=True, timeout=600)
    assert struct.unpack("<2q", run.stdout[:16]) == (0, dots)
    floats, integers, at = computed(PORTABLE, 0, 0), computed(DOTS, 0, 1), 16
    for product, in_floats, in_integers in zip(products, floats, integers, strict=True):
        expected = in_integers if dots and product.x.dtype is torch.bfloat16 else in_floats
        found = torch.frombuffer(bytearray(run.stdout[at : at + expected.nbytes]), dtype=expected.dtype)
        at += expected.nbytes
        assert_same_bits(found.view_as(expected), expected)
    assert at == len(run.stdout)


@pytest.mark.skipif(not compiler.availability().usable, reason="needs a C compiler")
def test_dot_products_have_the_bits_of_lookups(products, computed):
    """In portable code those of Arm, and those of AVX-512."""
    for found, expected, product in zip(computed(DOTS, 0, 1), computed((), 2, 0), products, strict=True):
        if product.x.dtype is torch.bfloat16:
            assert_same_bits(found, expected)


def assert_same_bits(found, expected):
    """NaN is NaN, whatever its sign is."""
    assert torch.equal(found.isnan(), expected.isnan())
    bits = {2: torch.int16, 4: torch.int32}[expected.element_size()]
    there = ~expected.isnan()
    assert torch.equal(found[there].view(bits), expected[there].view(bits))


@needs_cross
@pytest.mark.parametrize("march", ["armv8-a", "armv8.2-a+dotprod", "armv8.2-a+dotprod+bf16", "armv9-a"])
@pytest.mark.parametrize("source", ["binary_linear.c", "columns.c", "trellis.c"])
def test_every_source_compiles_for_arm(march, source, tmp_path):
    assert_compiles(CROSS, f"-march={march}", source=source, folder=tmp_path)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AMX is of x86")
def test_the_kernel_compiles_for_a_matrix_unit(tmp_path):
    """Which changes the tokens from which torch computes (`kernel._DENSE_FROM`); to run it takes such a machine."""
    found = compiler.find_compiler()
    if found is None:
        pytest.skip("needs a C compiler")
    flags = ("-march=x86-64-v4", "-mamx-tile", "-mamx-int8", "-mamx-bf16")
    assert_compiles(*found, *flags, source="binary_linear.c", folder=tmp_path)


def assert_compiles(*command, source, folder):
    target = folder / "compiled.o"
    subprocess.run(
        [*command, *compiler.FLAGS, "-c", str(SOURCES / source), "-o", str(target)],
        check=True, timeout=600,
    )  # fmt: skip
    assert target.stat().st_size
