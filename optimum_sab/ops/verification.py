"""Triton kernels against the reference, once per process and device before anything is computed with them."""

from __future__ import annotations

import torch

from optimum_sab.core.settings import LayerSettings
from optimum_sab.format.layout import salient_per_block, tensor_specs
from optimum_sab.format.packed_weight import PackedWeight
from optimum_sab.ops.shape import LayerShape

ROWS, COLUMNS = 96, 544  # several tiles either way, and a last block that is not full
TOKENS = (1, 3, 8, 24, 700)  # every kernel, and every width of the one for few tokens
TOLERANCE = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-8}


def disagreement(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> str | None:
    """Compare the kernels with the reference on a small layer.

    Returns:
        None where they agree on ``device``; else what is wrong, as the end of a sentence.
    """
    from sab_kernels import binary_linear, to_kernel_layout

    settings = LayerSettings()
    packed = sample_weight(settings)
    shape = LayerShape.of(ROWS, COLUMNS, settings)
    dense = packed.dequantize().double()
    generator = torch.Generator().manual_seed(1)
    try:
        tensors = to_kernel_layout({k: t.to(device) for k, t in packed.tensors.items()}, shape.geometry)
        for tokens in TOKENS:
            x = torch.randn(tokens, COLUMNS, generator=generator).to(dtype)
            found = binary_linear(x.to(device), tensors, shape.geometry).cpu().double()
            expected = x.double() @ dense.T
            error = float((found - expected).abs().max() / expected.abs().max())
            if not error <= TOLERANCE[dtype]:
                return (
                    f"the Triton kernels are wrong on it (relative error {error:.2g} with {tokens} tokens); please "
                    "report this with the output of `optimum-sab env`"
                )
    except Exception as error:  # whatever a compiler or driver raises: the reference still gives right answers
        first = str(error).strip().partition("\n")[0]
        return f"the Triton kernels do not run on it ({type(error).__name__}: {first})"
    return None


def sample_weight(settings: LayerSettings, out_features: int = ROWS, in_features: int = COLUMNS) -> PackedWeight:
    """A valid layer of random signs and scales on the CPU, always the same."""
    generator = torch.Generator().manual_seed(0)
    specs = tensor_specs(out_features, in_features, settings)
    words = torch.randint(-(2**31), 2**31, specs["weight"].shape, generator=generator)
    tail = in_features % 32
    if tail:
        words[..., -1] &= (1 << tail) - 1
    tensors = {"weight": words.to(torch.int32)}
    if settings.residual_planes:
        salient = salient_per_block(in_features, settings)
        width = [min(settings.block_size, in_features - k * settings.block_size) for k in range(len(salient))]
        index = [torch.randperm(w, generator=generator)[:n].sort().values for w, n in zip(width, salient)]
        tensors["residual_index"] = torch.cat(index).to(specs["residual_index"].dtype)
        signs = torch.randint(0, 256, specs["residual_sign"].shape, generator=generator)
        if sum(salient) % 8:
            signs[..., -1] &= (1 << sum(salient) % 8) - 1
        tensors["residual_sign"] = signs.to(torch.uint8)
    scale = torch.rand(specs["row_scale"].shape, generator=generator) * 0.03 + 0.01
    if settings.row_scale == "fp8":
        tensors["row_scale"] = (scale * 2**8).to(torch.float8_e4m3fn).view(torch.uint8)
        tensors["row_exponent"] = torch.full((out_features,), -8, dtype=torch.int8)
    else:
        tensors["row_scale"] = scale.half().view(torch.int16)
    tensors["col_scale"] = (torch.rand(in_features, generator=generator) + 0.5).half().view(torch.int16)
    return PackedWeight({name: tensors[name].contiguous() for name in specs}, out_features, in_features, settings)
