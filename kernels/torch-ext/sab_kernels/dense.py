"""Many tokens: the weight is made dense a piece at a time, and multiplied as ever."""

import torch

from .dequantize import dequantize_into
from .geometry import TILE_ROWS
from .product import Product
from .tuning import Launch


def multiply_dense(product: Product, launch: Launch) -> None:
    """Write the outputs of any number of tokens: pieces of rows are made dense in one buffer, which they share."""
    x, geometry = product.x, product.geometry
    piece = max(1, launch.dense_bytes // (x.element_size() * geometry.columns * TILE_ROWS)) * TILE_ROWS
    scratch = product.space(min(piece, max(product.sizes)), geometry.columns, dtype=x.dtype)
    first = 0
    for index, (out, size) in enumerate(zip(product.outputs, product.sizes)):
        for start in range(0, size, piece):
            stop = min(start + piece, size)
            weight = scratch[: stop - start]
            dequantize_into(weight, product.tensors, geometry, first + start)
            if stop - start == size:
                torch.mm(x, weight.T, out=out)
            else:
                out[:, start:stop] = x @ weight.T
        if product.biases:
            out += product.biases[index].to(out.dtype)
        first += size
