"""Triton kernels against the reference, once per process and device before anything is computed with them."""

from __future__ import annotations

import torch

from optimum_sab.core.code import TRELLIS16, TRELLIS16X2
from optimum_sab.core.settings import LayerSettings
from optimum_sab.format.packed_weight import PackedWeight
from optimum_sab.format.random_weight import random_packed
from optimum_sab.ops.shape import LayerShape

ROWS, COLUMNS = 96, 544  # several tiles either way, and a last block that is not full
TOKENS = (1, 3, 8, 24, 700)  # every kernel, and every width of the one for few tokens
CODED = {  # with a code that one is another for one token and for two; of the second code, one of each
    LayerSettings(code=TRELLIS16.name): (1, 2, 8, 24, 700),
    LayerSettings(code=TRELLIS16X2.name, base_planes=2): (1, 8, 700),
}
EXPERTS, PAIRS = 3, (2, 10, 32)  # pairs by themselves, and tiles for few and for many pairs of an expert
TOLERANCE = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-8, torch.float32: 2.0**-10}


def disagreement(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> str | None:
    """Compare the kernels with the reference on a small layer, on one with each code, and on a few experts.

    Returns:
        None where they agree on ``device``; else what is wrong, as the end of a sentence.
    """
    for settings, counts in ((LayerSettings(), TOKENS), *CODED.items()):
        wrong = _disagreement(settings, counts, device, dtype)
        if wrong is not None:
            return wrong
    return _experts_disagreement(LayerSettings(), device, dtype)


def _disagreement(
    settings: LayerSettings, counts: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> str | None:
    packed = sample_weight(settings)
    shape = LayerShape.of(ROWS, COLUMNS, settings)  # its geometry imports the kernels
    dense = packed.dequantize().double()
    generator = torch.Generator().manual_seed(1)
    try:
        from sab_kernels import binary_linear, to_kernel_layout

        tensors = to_kernel_layout({k: t.to(device) for k, t in packed.tensors.items()}, shape.geometry)
        for tokens in counts:
            x = torch.randn(tokens, COLUMNS, generator=generator).to(dtype)
            found = binary_linear(x.to(device), tensors, shape.geometry)
            wrong = _wrong(found, x.double() @ dense.T, dtype, f"{tokens} tokens")
            if wrong is not None:
                return wrong
    except Exception as error:  # whatever a compiler or driver raises: the reference still gives right answers
        return raised(error, "kernels")
    return None


def _experts_disagreement(settings: LayerSettings, device: torch.device, dtype: torch.dtype) -> str | None:
    layers = [random_packed(ROWS, COLUMNS, settings, seed) for seed in range(EXPERTS)]
    shape = LayerShape.of(ROWS, COLUMNS, settings)
    dense = torch.stack([each.dequantize().double() for each in layers])
    generator = torch.Generator().manual_seed(2)
    try:
        from sab_kernels import experts_linear, to_kernel_layout

        each = [to_kernel_layout({k: t.to(device) for k, t in p.tensors.items()}, shape.geometry) for p in layers]
        tensors = {name: torch.stack([own[name] for own in each]) for name in shape.names}
        for pairs in PAIRS:
            x = torch.randn(pairs // 2, COLUMNS, generator=generator).to(dtype)
            chosen = torch.randint(0, EXPERTS, (pairs,), generator=generator)
            found = experts_linear(x.to(device), chosen.to(device), tensors, shape.geometry, None, 2)
            expected = (dense[chosen] @ x.double().repeat_interleave(2, 0)[..., None])[..., 0]
            wrong = _wrong(found, expected, dtype, f"{pairs} pairs of tokens and experts")
            if wrong is not None:
                return wrong
    except Exception as error:  # as above
        return raised(error, "kernels")
    return None


def _wrong(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, given: str) -> str | None:
    error = float((found.cpu().double() - expected).abs().max() / expected.abs().max())
    if error <= TOLERANCE[dtype]:
        return None
    return (
        f"the Triton kernels are wrong on it (relative error {error:.2g} with {given}); please report this with the "
        "output of `optimum-sab env`"
    )


def raised(error: Exception, what: str) -> str:
    """Of an error of Triton's ``what`` on a device, the end of a sentence."""
    first = str(error).strip().partition("\n")[0]
    return f"the Triton {what} do not run on it ({type(error).__name__}: {first})"


def sample_weight(settings: LayerSettings, out_features: int = ROWS, in_features: int = COLUMNS) -> PackedWeight:
    """A valid layer of random signs and scales on the CPU, always the same."""
    return random_packed(out_features, in_features, settings)
