"""The C kernel of routed rows: what `kernel.linear` gives for every expert's rows, whoever shares the launch."""

import itertools
from pathlib import Path

import pytest
import torch

from optimum_sab.errors import FormatError
from optimum_sab.ops.cpu import compiler, experts, kernel
from optimum_sab.ops.reference import binary_linear
from optimum_sab.ops.shape import LayerShape

EXPERTS = 5
KINDS = [
    *itertools.product([(1, 0), (1, 1), (2, 1), (2, 2)], [32, 128], ["none"]),
    *itertools.product([(1, 0), (1, 1), (2, 1), (3, 0)], [128, 512], ["trellis16"]),
]
SIZES = [(1, 31), (33, 75), (70, 300), (16, 128)]
every_code = pytest.mark.parametrize("code", ["none", "trellis16"])


@pytest.fixture(params=["portable", "avx2", "avx512"])
def path(request, monkeypatch, compiled):
    """Each of the kernel's paths that this machine has."""
    number = ["portable", "avx2", "avx512"].index(request.param)
    build = compiled(f"-DSAB_PATH={number}")
    if build.library is None or build.library.sab_path() != number:
        pytest.skip(f"no {request.param} here: {build.reason}")
    for module in (kernel, experts):
        monkeypatch.setattr(module, "load_library", lambda: build.library)
    return request.param


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Outputs hold NaN until something is written."""
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *size, **o: empty(x, *size, **o).fill_(float("nan")))


def take_dense_from(monkeypatch, rows):
    """Experts with so many rows are made dense."""
    monkeypatch.setattr(kernel, "_DENSE_FROM", {key: dict.fromkeys(kernel.DTYPES, rows) for key in kernel._DENSE_FROM})


def stacked(layers):
    shape = LayerShape.of(layers[0].out_features, layers[0].in_features, layers[0].settings)
    return [torch.stack([layer.tensors[name] for layer in layers]) for name in shape.names], shape


def random_inputs(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_experts(pairs, seed=3):
    """Half of the pairs at one expert, none at another, some at none."""
    chosen = torch.randint(-1, EXPERTS + 1, (pairs,), generator=torch.Generator().manual_seed(seed))
    chosen[::2] = 1
    return chosen.where(chosen != 2, -1)


def each_alone(x, chosen, layers, bias, repeats):
    """Every pair by itself with its expert's own tensors."""
    rows = torch.zeros(len(chosen), layers[0].out_features, dtype=x.dtype)
    for s, e in enumerate(chosen.tolist()):
        if 0 <= e < len(layers):
            rows[s] = kernel.linear(x[s // repeats][None], layers[e], None if bias is None else bias[e])[0]
    return rows


@pytest.mark.parametrize(("planes", "block_size", "code"), KINDS)
def test_pairs_equal_their_experts_alone_to_the_bit(path, random_packed, monkeypatch, planes, block_size, code):
    take_dense_from(monkeypatch, 2**62)
    for number, (rows, width) in enumerate(SIZES):
        settings = {"block_size": block_size, "base_planes": planes[0], "residual_planes": planes[1], "code": code}
        scale = ("fp8", "fp16")[number % 2]
        layers = [random_packed(rows, width, seed, row_scale=scale, **settings) for seed in range(EXPERTS)]
        dtype, repeats = list(kernel.DTYPES)[number % 3], 1 + number % 2
        x, bias = random_inputs(20, width, dtype=dtype), random_inputs(EXPERTS, rows)
        chosen = random_experts(20 * repeats)
        for added in (None, bias):
            found = experts.experts_linear_of(x, chosen, *stacked(layers), added, repeats)
            assert torch.equal(found, each_alone(x, chosen, layers, added, repeats))


@every_code
def test_pairs_equal_the_reference(path, random_packed, code):
    layers = [random_packed(70, 300, seed, code=code) for seed in range(EXPERTS)]
    x, chosen = random_inputs(30, 300), random_experts(60)
    found = experts.experts_linear_of(x, chosen, *stacked(layers), None, 2)
    for e, layer in enumerate(layers):
        pairs = (chosen == e).nonzero()[:, 0]
        torch.testing.assert_close(found[pairs], binary_linear(x[pairs // 2], layer), rtol=1e-4, atol=1e-4)
    assert not found[(chosen < 0) | (chosen >= EXPERTS)].any()


@every_code
def test_pairs_are_the_same_for_any_number_of_threads(path, random_packed, code):
    """The stack is large enough for several threads to be started."""
    layers = [random_packed(331, 1024, seed, code=code) for seed in range(3)]
    tensors, shape = stacked(layers)
    x, chosen = random_inputs(9, 1024), torch.tensor([0, 2, 1, 0, 0, 2, -1, 0, 0] * 2)
    threads, found = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        try:
            found.append(experts.experts_linear_of(x, chosen, tensors, shape, None, 2))
        finally:
            torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert torch.equal(found[0], each_alone(x, chosen, layers, None, 2))


@every_code
@pytest.mark.parametrize("dtype", list(kernel.DTYPES))
@pytest.mark.parametrize("bias", [False, True])
def test_experts_with_many_rows_go_through_the_dense_weight(path, random_packed, monkeypatch, dtype, bias, code):
    """As linears do, bit for bit; the others stay packed."""
    take_dense_from(monkeypatch, 8)
    layers = [random_packed(70, 300, seed, code=code) for seed in range(EXPERTS)]
    added = random_inputs(EXPERTS, 70) if bias else None
    dense = []
    through = experts.multiply_dense
    monkeypatch.setattr(experts, "multiply_dense", lambda *a: dense.append(len(a[2])) or through(*a))
    x, chosen = random_inputs(24, 300, dtype=dtype), torch.tensor([1, 0, 1, 4, 1, 3, -1, 1] * 6)
    chosen[:5] = 0  # 3 and 4 have six each and stay below
    found = experts.experts_linear_of(x, chosen, *stacked(layers), added, 2)
    counts = chosen[chosen >= 0].bincount(minlength=EXPERTS).tolist()
    assert dense == [n for n in counts if n >= 8] and len(dense) == 2
    for e, layer in enumerate(layers):
        pairs = (chosen == e).nonzero()[:, 0]
        own = None if added is None else added[e]
        assert torch.equal(found[pairs], kernel.linear(x[pairs // 2], layer, own))
    assert not found[chosen < 0].any()


@every_code
def test_pairs_read_nothing_of_experts_that_they_do_not_go_to(path, random_packed, code):
    layers = [random_packed(40, 300, seed, code=code, row_scale="fp16") for seed in range(EXPERTS)]
    tensors, shape = stacked(layers)
    for tensor in tensors:
        tensor[[0, 2, 4]] = 0x7E00 if tensor.dtype is torch.int16 else -1 if tensor.dtype is torch.int32 else 255
    x, chosen = random_inputs(10, 300), torch.tensor([1, 3] * 5)
    found = experts.experts_linear_of(x, chosen, tensors, shape, None, 1)
    assert torch.equal(found, each_alone(x, chosen, layers, None, 1))
    assert experts.experts_linear_of(x, torch.full((10,), 2), tensors, shape, None, 1).isnan().all()


def test_no_pairs_and_no_experts_are_empty(random_packed):
    tensors, shape = stacked([random_packed(20, 75)])
    none = torch.zeros(0, dtype=torch.int64)
    assert experts.experts_linear_of(torch.zeros(0, 75), none, tensors, shape, None, 8).shape == (0, 20)
    empty = [tensor[:0] for tensor in tensors]
    assert not experts.experts_linear_of(torch.ones(2, 75), torch.tensor([0, 1]), empty, shape, None, 1).any()


@pytest.mark.parametrize("damage", [lambda t: t[..., :-1], lambda t: t[None], lambda t: t.double()])
@pytest.mark.parametrize("place", range(6))
def test_stack_that_was_changed_is_refused(random_packed, damage, place):
    """Also where it begins at the same address: C would read past its end."""
    tensors, shape = stacked([random_packed(20, 75, seed) for seed in range(3)])
    x, chosen = random_inputs(2, 75), torch.tensor([0, 2])
    experts.experts_linear_of(x, chosen, tensors, shape, None, 1)
    changed = [*tensors]
    changed[place] = damage(changed[place])
    with pytest.raises(FormatError, match=shape.names[place]):
        experts.experts_linear_of(x, chosen, changed, shape, None, 1)
    assert experts.direct_experts(x, chosen, changed, shape, None, 1) is None


def test_stack_of_another_number_of_experts_at_the_same_address_is_another(random_packed):
    layers = [random_packed(20, 75, seed) for seed in range(4)]
    tensors, shape = stacked(layers)
    x, chosen = random_inputs(3, 75), torch.tensor([1, 3, 0])
    whole = experts.experts_linear_of(x, chosen, tensors, shape, None, 1)
    fewer = experts.experts_linear_of(x, chosen, [tensor[:2] for tensor in tensors], shape, None, 1)
    assert torch.equal(fewer[[0, 2]], whole[[0, 2]]) and not fewer[1].any() and whole[1].any()


def test_no_memory_is_an_error(random_packed, monkeypatch):
    tensors, shape = stacked([random_packed(20, 75)])
    library = compiler.load_library()
    monkeypatch.setattr(experts, "load_library", lambda: Failing(library))
    with pytest.raises(MemoryError, match="20 × 75"):
        experts.experts_linear_of(torch.zeros(1, 75), torch.zeros(1, dtype=torch.int64), tensors, shape, None, 1)


class Failing:
    """A library whose kernel finds no room."""

    def __init__(self, library):
        self.kind = library.kind

    def sab_experts(self, *arguments):
        return 1


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system does not tell the peak of memory")
def test_call_takes_less_than_a_twentieth_of_the_weights_beside_its_output(random_packed):
    tensors, shape = stacked([random_packed(512, 2048, seed) for seed in range(64)])
    size = sum(tensor.nbytes for tensor in tensors)
    x, chosen = random_inputs(16, 2048), torch.arange(64).repeat(2)
    experts.experts_linear_of(x[:1], chosen[:1], tensors, shape, None, 1)
    before = peak_bytes(reset=True)
    y = experts.experts_linear_of(x, chosen, tensors, shape, None, 8)
    assert size > 8e6 and peak_bytes() - before - y.nbytes < size / 20


def peak_bytes(reset=False):
    """The process's largest resident size, since it was reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
