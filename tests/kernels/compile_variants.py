"""Compile kernels for devices that need not be there, and say what came out: run by test_compile.py.

A process of its own, because that of the tests may interpret kernels. Prints one JSON object: what `describe` says of
every variant, by name.
"""

import json
import sys

from compiling import changed, compiled, describe

from sab_kernels import Geometry
from sab_kernels.arguments import (
    Activations,
    ByteTables,
    Extent,
    LimbOperand,
    PackedRows,
    Parts,
    Stack,
    layer_kind,
)
from sab_kernels.columns import ROWS, TILE, WARPS, Levels, column_kernel
from sab_kernels.decode import decode_kernel
from sab_kernels.dequantize import dequantize_kernel
from sab_kernels.device import DeviceTraits
from sab_kernels.expert_batch import expert_batch_kernel, prepare_expert_floats_kernel
from sab_kernels.expert_decode import expert_decode_kernel, prepare_expert_limbs_kernel
from sab_kernels.expert_tiles import Routing, tile_table_kernel
from sab_kernels.prepare import prepare_limbs_kernel
from sab_kernels.prepare_floats import prepare_floats_kernel
from sab_kernels.small_batch import small_batch_kernel

EXTENT = Extent("i32", "i32", "i32")
INPUTS = Activations("*bf16", "*i16", "*i32", "i32", "i32", "i32")
LIMBS = LimbOperand("*i8", "*i32", "*fp32")
ZEROING = {"counter_ptr": "*i32", "counters": "i32", "COUNTERS_EACH": 1}
ROUTING = Routing("*i64", "*i64", "*i32", "i32", "i32")
PACKED = PackedRows("*i32", "*i32", "*u8", "*i8")


def kind(capability):
    geometry = Geometry(
        4096, 4096, block_size=128, base_planes=1, residual_planes=1, salient=16, salient_last=16, fp8=True
    )
    return layer_kind(geometry, DeviceTraits(native_fp8=capability >= 89, asm=True))


def product(capability):
    """What `Product.arguments` gives, as types, of three stacked layers."""
    stack = Stack(("*bf16",) * 4, ("*bf16",) * 4, ("i32",) * 3, "i32")
    constants = {"KIND": kind(capability), "HAS_BIAS": True, "STACK": 3}
    return {"layer": PACKED, **stack._asdict(), "tokens": "i32", "extent": EXTENT, **constants}


def decode(capability, **changes):
    arguments = {
        **product(capability),
        "columns": LIMBS,
        "slots": LIMBS,
        "parts": Parts("*fp32", "*i32"),
        "tables": ByteTables("i32", "i32", "i32"),
        "SCALE_COLUMNS": 128,
        "TILES": 2,
        "TOKENS": 4,
        "SLOT_TOKENS": 2,
        "SPLIT": 4,
        "UNROLL": 1,
        "CLASSES": 1,
    }
    return compiled(decode_kernel, capability, changed(arguments, changes), num_warps=1, num_stages=1)


def small_batch(capability, warps=4, **changes):
    arguments = {
        **product(capability),
        "x_ptr": "*bf16",
        "parts": Parts("*fp32", "*i32"),
        "padded": "i32",
        "row_tiles": "i32",
        "TILES": warps,
        "TOKENS": 16,
        "SPLIT": 4,
        "WIDE_LANES": not (capability // 10 == 9 and warps % 4 == 0),
        "PRECISION": "ieee",
    }
    return compiled(small_batch_kernel, capability, changed(arguments, changes), num_warps=warps, num_stages=3)


def expert_decode(capability, **changes):
    """Of one pair by itself; ``TILED`` with up to ``TOKENS`` pairs of one expert."""
    arguments = {
        **product(capability),
        "columns": LIMBS,
        "slots": LIMBS,
        "parts": Parts("*fp32", "*i32"),
        "routing": ROUTING,
        "row_tiles": "i32",
        "tables": ByteTables("i32", "i32", "i32"),
        "SCALE_COLUMNS": 128,
        "STACK": 1,
        "TILED": False,
        "TILES": 2,
        "TOKENS": 4,
        "SLOT_TOKENS": 2,
        "SPLIT": 4,
        "UNROLL": 1,
        "CLASSES": 1,
    }
    return compiled(expert_decode_kernel, capability, changed(arguments, changes), num_warps=1, num_stages=1)


def expert_batch(capability, warps=4, **changes):
    arguments = {
        **product(capability),
        "x_ptr": "*bf16",
        "parts": Parts("*fp32", "*i32"),
        "routing": ROUTING,
        "row_tiles": "i32",
        "STACK": 1,
        "TILES": warps,
        "TOKENS": 16,
        "SPLIT": 4,
        "WIDE_LANES": not (capability // 10 == 9 and warps % 4 == 0),
        "PRECISION": "ieee",
    }
    return compiled(expert_batch_kernel, capability, changed(arguments, changes), num_warps=warps, num_stages=3)


def dequantize(capability, **changes):
    arguments = {
        "layer": PACKED,
        "place_ptr": "*i32",
        "column_scale_ptr": "*i16",
        "out_ptr": "*bf16",
        **dict.fromkeys(("first_tile", "rows", "row_tiles", "columns"), "i32"),
        "extent": EXTENT,
        "KIND": kind(capability),
        "TILES": 4,
        "WIDE_LANES": capability // 10 != 9,
    }
    return compiled(dequantize_kernel, capability, changed(arguments, changes), num_warps=4, num_stages=1)


def prepare_limbs(capability, **changes):
    arguments = {
        "inputs": INPUTS,
        "columns": LIMBS,
        "slots": LIMBS,
        **ZEROING,
        "column_tiles": "i32",
        "TOKENS": 4,
        "SLOT_TOKENS": 2,
        "SCALE_COLUMNS": 128,
        "CLASSES": 0,
    }
    return compiled(prepare_limbs_kernel, capability, changed(arguments, changes))


def prepare_floats(capability, **changes):
    arguments = {
        "inputs": INPUTS,
        "out_ptr": "*bf16",
        **ZEROING,
        "padded": "i32",
        "column_tiles": "i32",
        "TOKENS": 16,
        "WIDE_LANES": capability < 90,
        "CODED": False,
    }
    return compiled(prepare_floats_kernel, capability, changed(arguments, changes))


def prepare_expert_limbs(capability, **changes):
    arguments = {
        "inputs": INPUTS,
        "columns": LIMBS,
        "slots": LIMBS,
        "routing": ROUTING,
        **ZEROING,
        "extent": EXTENT,
        "TILED": True,
        "TOKENS": 4,
        "SLOT_TOKENS": 4,
        "SCALE_COLUMNS": 128,
        "CLASSES": 0,
    }
    return compiled(prepare_expert_limbs_kernel, capability, changed(arguments, changes))


def prepare_expert_floats(capability, **changes):
    arguments = {
        "inputs": INPUTS,
        "out_ptr": "*bf16",
        "routing": ROUTING,
        **ZEROING,
        "extent": EXTENT,
        "TOKENS": 64,
        "EACH": 16,
        "WIDE_LANES": capability < 90,
        "CODED": False,
    }
    return compiled(prepare_expert_floats_kernel, capability, changed(arguments, changes))


def tile_table(capability, **changes):
    arguments = {
        "sorted_ptr": "*i64",
        "table_ptr": "*i32",
        **dict.fromkeys(("pairs", "experts", "tiles", "steps"), "i32"),
        "PAIRS": 64,
        "GROUPS": 256,
        "EACH": 32,
    }
    return compiled(tile_table_kernel, capability, changed(arguments, changes))


def columns(capability, **changes):
    """Of the solver: one block, two planes of which one is a residual."""
    arguments = {
        **dict.fromkeys(("x_ptr", "value_ptr", "step_ptr", "coupling_ptr"), "*fp32"),
        "sign_ptrs": ("*fp32",) * 2,
        "levels": Levels("*fp32", "*fp32", "*fp32", "*fp32", "*i1"),
        **dict.fromkeys(("rows", "width", "start", "end"), "i32"),
        **dict.fromkeys(("sign_stride", "sign_next", "coupling_stride", "coupling_next"), "i32"),
        "BASE": 1,
        "PLANES": 2,
        "DESCENT": False,
        "ROWS": ROWS,
        "TILE": TILE,
    }
    return compiled(column_kernel, capability, changed(arguments, changes), num_warps=WARPS, num_stages=1)


DENSE = (decode, small_batch, dequantize, prepare_limbs, prepare_floats, columns)
EXPERTS = (expert_decode, expert_batch, prepare_expert_limbs, prepare_expert_floats, tile_table)
KERNELS = {f.__name__: f for f in (*DENSE, *EXPERTS)}

if __name__ == "__main__":
    # argument: JSON {name: [kernel, capability, changes]}
    wanted = json.loads(sys.argv[1])
    results = {}
    for name, (kernel, capability, changes) in wanted.items():
        try:
            results[name] = describe(KERNELS[kernel](capability, **changes))
        except Exception as error:
            raise RuntimeError(f"{name} for sm_{capability}") from error
    json.dump(results, sys.stdout)
