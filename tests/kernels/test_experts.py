"""Products of pairs of a row and an expert against the reference, interpreted where there is no GPU."""

import pytest
import torch

pytest.importorskip("triton")
from sab_kernels import Launch, experts, experts_linear, to_kernel_layout
from sab_kernels.product import Product

pytestmark = pytest.mark.usefixtures("poisoned")  # every output and every intermediate must be written
WAYS = {
    "single": {"expert_single": 64},
    "tiles of 4": {"expert_single": 0, "expert_decode": 64},
    "tiles of 8": {"expert_single": 0, "expert_decode": 64},
    "batch": {"expert_single": 0, "expert_decode": 0},
}
EXPERTS = 3
# in no order; two rows' pairs with expert 0, none with expert 1, and some with experts that are not there
IDS = {"tiles of 4": [2, -1, 0, 2, 0, 3]}
IDS |= {"single": [2, 7, 0, -5], "tiles of 8": [2, 0, 0, 2, -1, 0, 3, 0], "batch": [2, 0, 0, 2, -9, 0, 2**40, 0]}
BASE = {"base_planes": 1, "residual_planes": 1}
LAYERS = {
    "plain": (70, 300, BASE),
    "coded": (70, 300, {**BASE, "code": "trellis16"}),
    "one plane": (33, 140, {"residual_planes": 0, "block_size": 64}),
    "fine": (20, 140, {"base_planes": 2, "residual_planes": 2, "block_size": 32, "row_scale": "fp16"}),
    "coded fine": (33, 150, {"base_planes": 2, "code": "trellis16", "row_scale": "fp16", "salient_fraction": 0.3}),
    "one weight": (1, 1, {}),
}
ORDINARY = {(name, way) for name in ("plain", "coded") for way in WAYS}
ORDINARY |= {("one plane", "tiles of 4"), ("fine", "single"), ("coded fine", "batch"), ("one weight", "batch")}


class Experts:
    """Packed experts, as stored and as the kernels read them."""

    def __init__(self, layers, device):
        self.packed = [layer.packed for layer in layers]
        self.geometry, self.device = layers[0].geometry, device
        stored = [to_kernel_layout(packed.tensors, self.geometry) for packed in self.packed]
        self.tensors = {name: torch.stack([each[name] for each in stored]).to(device) for name in stored[0]}

    def inputs(self, count, dtype):
        x = torch.randn(count, self.geometry.columns, generator=torch.Generator().manual_seed(2))
        return x.to(dtype).to(self.device)

    def bias(self, dtype=torch.float32):
        bias = torch.randn(len(self.packed), self.geometry.rows, generator=torch.Generator().manual_seed(1))
        return bias.to(dtype).to(self.device)

    def product(self, rows, ids, bias=None, repeats=1):
        ids = ids if isinstance(ids, torch.Tensor) else torch.tensor(ids)
        found = experts_linear(rows, ids.to(self.device), self.tensors, self.geometry, bias, repeats)
        assert found.dtype == rows.dtype and found.is_contiguous()
        return found

    def expected(self, rows, ids, bias=None, repeats=1):
        """The reference's fp32 result."""
        from optimum_sab.ops.reference import binary_linear

        x, found = rows.cpu().float(), torch.zeros(len(ids), self.geometry.rows)
        for pair, expert in enumerate(ids):
            if 0 <= expert < len(self.packed):
                one = None if bias is None else bias[expert].cpu().float()
                found[pair] = binary_linear(x[pair // repeats][None], self.packed[expert], one)[0]
        return found


@pytest.fixture(scope="module")
def experts_of(random_layer, device):
    """``experts_of(name)``: three experts of a layer in `LAYERS`."""
    known = {}

    def build(name):
        if name not in known:
            rows, columns, settings = LAYERS[name]
            known[name] = Experts([random_layer(rows, columns, seed, **settings) for seed in range(EXPERTS)], device)
        return known[name]

    return build


@pytest.fixture
def launched(monkeypatch):
    """``launched(way, **settings)``: have products computed so."""

    def choose(way, **settings):
        launch = Launch(**{**WAYS[way], **settings})
        monkeypatch.setattr(experts, "device_launch", lambda device: launch)

    return choose


@pytest.mark.parametrize(
    ("name", "way"),
    [
        pytest.param(name, way, marks=() if (name, way) in ORDINARY else pytest.mark.full)
        for name in LAYERS
        for way in WAYS
    ],
)
def test_experts_linear_is_the_reference_s(experts_of, assert_near, launched, name, way):
    """With experts that are not there, whose result is zeros, one without pairs, and a bias."""
    layer, ids = experts_of(name), IDS[way]
    launched(way)
    x, bias = layer.inputs(len(ids), torch.float16), layer.bias(torch.float16)
    found = layer.product(x, ids, bias)
    assert_near(found, layer.expected(x, ids, bias))
    for pair, expert in enumerate(ids):
        assert (0 <= expert < EXPERTS) == bool(found[pair].any())


@pytest.mark.parametrize("way", WAYS)
def test_rows_are_repeated(experts_of, assert_near, launched, way):
    layer = experts_of("one plane")
    launched(way)
    ids = [1, 0, 2, 0, 1, 2] if way != "tiles of 8" else [1, 0, 2, 0, 1, 2, 1, 1, 1]
    for repeats, dtype in ((3, torch.int32), (len(ids), torch.uint8)):
        x = layer.inputs(len(ids) // repeats, torch.float16)
        found = layer.product(x, torch.tensor(ids, dtype=dtype), repeats=repeats)
        assert_near(found, layer.expected(x, ids, repeats=repeats))


@pytest.mark.parametrize("name", ["one plane", "coded"])
def test_fp32_rows_keep_their_precision(experts_of, assert_near, launched, name):
    layer = experts_of(name)
    launched("single")
    x, ids = layer.inputs(5, torch.float32), [2, 1, -1, 2, 0]
    assert_near(layer.product(x, ids), layer.expected(x, ids))


def test_all_pairs_may_be_one_expert_s(experts_of, assert_near, launched):
    """More than a tile takes."""
    layer = experts_of("one plane")
    x = layer.inputs(19, torch.float16)
    for way, count in (("single", 3), ("tiles of 4", 6), ("tiles of 8", 9), ("batch", 19)):
        launched(way, expert_tokens=16)
        ids = [1] * count
        assert_near(layer.product(x[:count], ids), layer.expected(x[:count], ids))


@pytest.mark.parametrize("way", ["single", "batch"])
def test_no_pair_may_have_an_expert(experts_of, launched, way):
    layer = experts_of("one plane")
    launched(way)
    found = layer.product(layer.inputs(3, torch.float16), [-1, 3, 3], layer.bias())
    assert torch.equal(found.cpu(), torch.zeros(3, 33, dtype=torch.float16))


@pytest.mark.parametrize("name", ["plain", "coded"])
@pytest.mark.parametrize("way", ["single", "tiles of 4", "batch"])
def test_columns_in_parts_are_the_reference_s(random_layer, device, assert_near, launched, monkeypatch, name, way):
    split, parts = Product.split, []
    monkeypatch.setattr(Product, "split", lambda *given: parts.append(split(*given)) or parts[-1])
    settings = LAYERS[name][2]
    layer = Experts([random_layer(64, 600, seed, **settings) for seed in range(2)], device)
    launched(way, decode_programs=64, batch_programs=64, batch_warps=1)
    ids = [1, 1, -1] if way != "tiles of 4" else [1, 1, 1, -1]
    x, bias = layer.inputs(len(ids), torch.float16), layer.bias()
    assert_near(layer.product(x, ids, bias), layer.expected(x, ids, bias))
    assert device.type != "cpu" or parts == [2]


@pytest.mark.parametrize("way", ["single", "tiles of 4", "batch"])
def test_what_is_not_finite_stays_within_its_pair(experts_of, launched, way):
    layer = experts_of("one plane")
    launched(way)
    ids = [1, 1, 0, 1]
    x = layer.inputs(len(ids), torch.float16)
    clean = layer.product(x, ids)
    x[1, 131] = float("nan")
    found = layer.product(x, ids)
    assert not bool(torch.isfinite(found[1]).any())
    others = [0, 2, 3]
    assert torch.equal(found[others], clean[others])


def test_rows_and_ids_of_any_strides_are_read(experts_of, launched):
    layer, ids = experts_of("one plane"), torch.tensor([2, 0, 0, 1])
    launched("single")
    x = layer.inputs(4, torch.float16)
    expected = layer.product(x, ids)
    assert torch.equal(layer.product(x.T.contiguous().T, ids.repeat_interleave(3)[::3]), expected)
    wide = torch.stack([x, x * 2], 1).flatten(1)[:, :140]
    assert torch.equal(layer.product(wide, ids), expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted where there is no GPU")
def test_interpreted_bf16_is_fp32_s_rounded_once(experts_of):
    layer, ids = experts_of("one plane"), [2, 0, -1]
    x = layer.inputs(3, torch.bfloat16)
    assert torch.equal(layer.product(x, ids), layer.product(x.float(), ids).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_pairs_and_no_experts_give_an_empty_or_zero_result(experts_of, dtype):
    layer = experts_of("one plane")
    assert layer.product(layer.inputs(0, dtype), torch.empty(0, dtype=torch.int64), repeats=4).shape == (0, 33)
    none = {name: tensor[:0] for name, tensor in layer.tensors.items()}
    found = experts_linear(layer.inputs(2, dtype), torch.zeros(2, dtype=torch.int64), none, layer.geometry, None, 1)
    assert torch.equal(found, torch.zeros(2, 33, dtype=dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS)
def test_experts_linear_is_captured_in_a_graph(experts_of, assert_near, launched, way):
    """Other experts at every replay."""
    layer, ids = experts_of("plain"), torch.tensor(IDS[way], device="cuda")
    launched(way)
    x = layer.inputs(len(ids), torch.bfloat16)
    layer.product(x, ids)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = layer.product(x, ids)
    for _ in range(2):
        ids.copy_(ids.roll(1))
        graph.replay()
        assert_near(found, layer.expected(x, ids.tolist()))


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("way", WAYS)
def test_bf16_experts_linear_is_the_reference_s(experts_of, assert_near, launched, name, way):
    layer, ids = experts_of(name), IDS[way]
    launched(way)
    x = layer.inputs(len(ids), torch.bfloat16)
    assert_near(layer.product(x, ids, layer.bias()), layer.expected(x, ids, layer.bias()))


@pytest.mark.parametrize(
    ("pairs", "dtype", "expected"),
    [
        (1, "bfloat16", ("decode", 1)),
        (16, "float16", ("decode", 1)),
        (17, "bfloat16", ("decode", 4)),
        (32, "bfloat16", ("decode", 4)),
        (33, "bfloat16", ("decode", 8)),
        (64, "bfloat16", ("decode", 8)),
        (65, "bfloat16", ("batch", 16)),
        (257, "float16", ("batch", 32)),
        (512, "bfloat16", ("batch", 32)),
        (513, "bfloat16", ("batch", 64)),
        (10**6, "bfloat16", ("batch", 64)),
        (1, "float32", ("batch", 16)),
        (10**6, "float32", ("batch", 16)),
    ],
)
def test_way_follows_pairs_for_each_expert(pairs, dtype, expected):
    assert experts.expert_way(pairs, 16, getattr(torch, dtype), Launch()) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.zeros(2, 140)}, r"rows are \(2, 140\); 4 pairs with repeats=1 take \(4, 140\)"),
        ({"rows": torch.zeros(4, 139)}, r"rows are \(4, 139\)"),
        ({"rows": torch.zeros(4, 1, 140)}, r"rows are \(4, 1, 140\)"),
        ({"rows": torch.zeros(4, 140, dtype=torch.float64)}, "rows are torch.float64"),
        ({"rows": torch.zeros(4, 140, device="meta")}, "rows are on meta"),
        ({"experts": torch.zeros(2, 2, dtype=torch.int64)}, r"experts are torch.int64 \(2, 2\)"),
        ({"experts": torch.zeros(4)}, "experts are torch.float32"),
        ({"repeats": 3}, "4 pairs are not rows that are repeated 3 times"),
        ({"repeats": 0}, "repeated 0 times"),
        ({"bias": torch.zeros(33)}, r"bias is \(33,\); 3 experts take \[3, 33\]"),
    ],
)
def test_experts_linear_refuses_what_does_not_fit(experts_of, change, message):
    layer = experts_of("one plane")
    given = {"rows": torch.zeros(4, 140), "experts": torch.zeros(4, dtype=torch.int64), "bias": None, "repeats": 1}
    given = {k: v.to(layer.device) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    with pytest.raises(ValueError, match=message):
        experts_linear(**{**given, **change}, tensors=layer.tensors, geometry=layer.geometry)


def test_experts_linear_refuses_tensors_that_are_not_stacked(experts_of):
    layer = experts_of("one plane")
    x, ids = layer.inputs(1, torch.float16), torch.zeros(1, dtype=torch.int64, device=layer.device)
    scale = layer.tensors["col_scale"]
    for wrong in (scale[:2], scale.T.contiguous().T):
        with pytest.raises(ValueError, match="col_scale is"):
            experts_linear(x, ids, {**layer.tensors, "col_scale": wrong}, layer.geometry, None, 1)
