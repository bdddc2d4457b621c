"""The dequantization kernel against the reference, interpreted where there is no GPU; and its compilation."""

import pytest
import torch

from optimum_sab.core.planes import BinaryPlanes
from optimum_sab.core.row_scale import round_column_scale, round_row_scale
from optimum_sab.core.saliency import salient_mask
from optimum_sab.core.settings import LayerSettings
from optimum_sab.format import PackedWeight

pytest.importorskip("triton")
from sab_kernels.dequantize import dequantize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_packed(rows, columns, settings, seed=0):
    g = torch.Generator().manual_seed(seed)
    mask = torch.zeros(columns, dtype=torch.bool)
    for start in range(0, columns, settings.block_size):
        width = min(settings.block_size, columns - start)
        mask[start : start + width] = salient_mask(torch.rand(width, generator=g), settings.salient_columns(width))
    index = mask.nonzero()[:, 0]
    blocks = -(-columns // settings.block_size)
    planes = BinaryPlanes(
        base_sign=torch.rand(settings.base_planes, rows, columns, generator=g) < 0.5,
        residual_sign=torch.rand(settings.residual_planes, rows, index.numel(), generator=g) < 0.5,
        residual_index=index,
        row_scale=round_row_scale(torch.rand(settings.planes, blocks, rows, generator=g) + 0.1, settings.row_scale),
        column_scale=round_column_scale(torch.rand(columns, generator=g) + 0.5),
        block_size=settings.block_size,
    )
    return PackedWeight.pack(planes, settings)


def run(packed, out):
    tensors = packed.tensors
    return dequantize(
        tensors["weight"].to(DEVICE),
        packed.row_scale().to(DEVICE),
        packed.column_scale().to(DEVICE),
        packed.settings.block_size,
        tensors["residual_sign"].to(DEVICE) if "residual_sign" in tensors else None,
        packed.salient_columns().to(DEVICE),
        out=out,
    )


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 40), (33, 128), (64, 300), (70, 257)])
@pytest.mark.parametrize(("base", "residual"), [(1, 1), (1, 0), (2, 1), (2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dequantize_matches_the_reference(rows, columns, base, residual, dtype):
    settings = LayerSettings(base_planes=base, residual_planes=residual, row_scale="fp8" if base == 1 else "fp16")
    packed = random_packed(rows, columns, settings)
    out = torch.full((rows, columns), float("nan"), dtype=dtype, device=DEVICE)  # every element must be written
    assert torch.equal(run(packed, out).cpu(), packed.dequantize().to(dtype))


def test_dequantize_refuses_tensors_of_different_layers():
    packed = random_packed(8, 128, LayerSettings())
    with pytest.raises(ValueError, match="do not belong to one layer"):
        dequantize(packed.tensors["weight"], packed.row_scale()[:, :, :4], packed.column_scale(), 128)
    with pytest.raises(ValueError, match="contiguous"):
        run(packed, torch.empty(128, 8, device=DEVICE).T)


@pytest.mark.gpu
def test_dequantize_writes_bfloat16():
    packed = random_packed(70, 257, LayerSettings())
    out = torch.full((70, 257), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    assert torch.equal(run(packed, out).cpu(), packed.dequantize().bfloat16())


@pytest.mark.parametrize("capability", [80, 90])
def test_dequantize_compiles_without_spills(capability, tmp_path):
    """Compiled in a process of its own, because this one may be interpreting."""
    import os
    import subprocess
    import sys

    script = f"""
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sab_kernels.dequantize import dequantize_kernel as kernel

types = dict(word_ptr="*i32", byte_ptr="*u8", slot_ptr="*i32", row_scale_ptr="*fp32", column_scale_ptr="*fp32",
             out_ptr="*bf16", rows="i32", columns="i32", words="i32", residual_bytes="i32", blocks="i32")
constants = dict(BASE=1, RESIDUAL=1, BLOCK_SIZE=128, TILE_ROWS=32, TILE_COLUMNS=128)
signature = {{**types, **{{name: "constexpr" for name in constants}}}}
done = triton.compile(ASTSource(fn=kernel, signature=signature, constexprs=constants),
                      target=GPUTarget("cuda", {capability}, 32))
assert ".local" not in done.asm["ptx"], "the kernel spills"
print("cubin", len(done.asm["cubin"]))
"""
    path = tmp_path / "compile.py"
    path.write_text(script)
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0 and "cubin" in done.stdout, done.stderr[-3000:]
