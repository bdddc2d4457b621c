"""A packed weight with random content, drawn directly in the stored format: for benchmarks and for checking kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from optimum_sab.core.row_scale import round_row_scale, row_exponent
from optimum_sab.core.settings import LayerSettings
from optimum_sab.format.layout import tensor_specs
from optimum_sab.format.packed_weight import PackedWeight

SCALE = 0.02  # of the base planes, as weights of language models have it


def random_packed(
    out_features: int,
    in_features: int,
    settings: LayerSettings,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> PackedWeight:
    """A valid packed weight: random signs and salient columns, row scales around `SCALE`, column scales around 1.

    Padding bits are 0, and the scales are stored as the packer stores them (with fp8, near the top of e4m3's range
    under a power of two per row), so a kernel meets what a checkpoint would give it.
    """
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(seed)
    specs = tensor_specs(out_features, in_features, settings)

    def integers(name: str, low: int, high: int) -> Tensor:
        spec = specs[name]
        return torch.randint(low, high, spec.shape, dtype=spec.dtype, device=device, generator=generator)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, device=device, generator=generator)

    tensors = {"weight": integers("weight", -(2**31), 2**31)}
    _clear_padding(tensors["weight"], in_features, 32)
    if settings.residual_planes:
        tensors["residual_sign"] = integers("residual_sign", 0, 256)
        _clear_padding(tensors["residual_sign"], specs["residual_index"].shape[0], 8)
        whole, rest = divmod(in_features, settings.block_size)
        columns = [
            uniform(blocks, width).argsort(-1)[:, : settings.salient_columns(width)].sort(-1).values.flatten()
            for blocks, width in ((whole, settings.block_size), (1, rest))
            if blocks and width
        ]
        tensors["residual_index"] = torch.cat(columns).to(specs["residual_index"].dtype)
    values = SCALE * (0.5 + uniform(*specs["row_scale"].shape))
    values[settings.base_planes :] *= 0.5  # a residual is smaller than what it corrects
    if settings.row_scale == "fp8":
        values = round_row_scale(values, "fp8")
        exponent = row_exponent(values)
        tensors["row_scale"] = (values / torch.exp2(exponent.float())).to(torch.float8_e4m3fn).view(torch.uint8)
        tensors["row_exponent"] = exponent
    else:
        tensors["row_scale"] = values.half().view(torch.int16)
    tensors["col_scale"] = (0.8 + 0.4 * uniform(in_features)).half().view(torch.int16)
    return PackedWeight(tensors, out_features, in_features, settings)


def _clear_padding(words: Tensor, columns: int, bits: int) -> None:
    used = columns % bits
    if used:
        words[..., -1] &= (1 << used) - 1
