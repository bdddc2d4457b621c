"""What the launches of a product have in common."""

import pytest
import torch

pytest.importorskip("triton")
from sab_kernels import product as products
from sab_kernels.decode import decode_kernel
from sab_kernels.device import DeviceTraits
from sab_kernels.product import Product
from sab_kernels.small_batch import small_batch_kernel


def product_of(layer, sizes, biases=()):
    x = layer.inputs(3, torch.float16)
    outputs = tuple(torch.empty(3, size, dtype=x.dtype, device=layer.device) for size in sizes)
    return Product(x, layer.tensors, layer.geometry, sizes, tuple(biases), outputs)


@pytest.mark.parametrize("kernel", [decode_kernel, small_batch_kernel])
def test_arguments_are_named_as_the_kernels_name_them(random_layer, kernel):
    given = product_of(random_layer(40, 64), (32, 8)).arguments()
    assert given.keys() <= set(kernel.arg_names)


@pytest.mark.parametrize(
    ("sizes", "bounds"),
    [
        ((70,), (70, 70, 70)),
        ((32, 38), (32, 70, 70)),
        ((32, 32, 6), (32, 64, 70)),
        ((32, 32, 5, 1), (32, 64, 69)),
    ],
)
def test_stack_always_has_four_layers_of_which_those_not_there_are_empty(random_layer, sizes, bounds):
    layer = random_layer(70, 64)
    biases = layer.bias().split(sizes)
    product = product_of(layer, sizes, biases)
    given = product.arguments()
    assert given["bounds"] == bounds and given["rows"] == 70 and given["STACK"] == len(sizes)
    for name, tensors in (("outputs", product.outputs), ("biases", biases)):
        assert len(given[name]) == 4
        assert all(found is one for found, one in zip(given[name], tensors))
    assert given["HAS_BIAS"] is True and product_of(layer, sizes).arguments()["HAS_BIAS"] is False


@pytest.mark.parametrize(
    ("processors", "columns", "programs", "per_processor", "expected"),
    [
        (100, 128 * 64, 100, 1, 1),  # as many as wanted
        (100, 128 * 64, 99, 2, 2),  # doubled while it stays within what is wanted
        (100, 128 * 64, 10, 4, 16),  # the most parts there may be
        (100, 128 * 7, 1, 64, 2),  # two tiles to a part
        (1, 128 * 64, 1, 5, 4),  # powers of two
    ],
)
def test_columns_are_split_to_fill_the_device(
    random_layer, monkeypatch, processors, columns, programs, per_processor, expected
):
    monkeypatch.setattr(products, "device_traits", lambda device: DeviceTraits(processors))
    assert product_of(random_layer(8, columns), (8,)).split(programs, per_processor) == expected


@pytest.mark.parametrize(("split", "numbers", "counters"), [(1, 0, 0), (2, 2 * 3 * 40, 3)])
def test_parts_take_memory_only_where_columns_are_split(random_layer, split, numbers, counters):
    parts = product_of(random_layer(8, 64), (8,)).parts(3, split, 40)
    assert (parts.total.numel(), parts.counter.numel()) == (numbers, counters)
    assert (parts.total.dtype, parts.counter.dtype) == (torch.float32, torch.int32)
