"""Compile kernels for devices that need not be there, and say what came out: run by test_compile.py.

A process of its own, because that of the tests may interpret kernels. Prints one JSON object: what `describe` says of
every variant, by name.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sab_kernels import Geometry
from sab_kernels.arguments import (
    Activations,
    ByteTables,
    Extent,
    LayerKind,
    LimbOperand,
    PackedRows,
    Parts,
    Stack,
    layer_kind,
)
from sab_kernels.decode import decode_kernel
from sab_kernels.dequantize import dequantize_kernel
from sab_kernels.device import DeviceTraits
from sab_kernels.prepare import prepare_floats_kernel, prepare_limbs_kernel
from sab_kernels.small_batch import small_batch_kernel

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
EXTENT = Extent("i32", "i32", "i32")
INPUTS = Activations("*bf16", "*i16", "*i32", "i32", "i32", "i32")
LIMBS = LimbOperand("*i8", "*i32", "*fp32")
ZEROING = {"counter_ptr": "*i32", "counters": "i32", "COUNTERS_EACH": 1}
ROWS = PackedRows("*i32", "*i32", "*u8", "*i8")


def kind(capability):
    geometry = Geometry(
        4096, 4096, block_size=128, base_planes=1, residual_planes=1, salient=16, salient_last=16, fp8=True
    )
    return layer_kind(geometry, DeviceTraits(native_fp8=capability >= 89, asm=True))


def product(capability):
    """What `Product.arguments` gives, as types, of three stacked layers."""
    stack = Stack(("*bf16",) * 4, ("*bf16",) * 4, ("i32",) * 3, "i32")
    constants = {"KIND": kind(capability), "HAS_BIAS": True, "STACK": 3}
    return {"layer": ROWS, **stack._asdict(), "tokens": "i32", "extent": EXTENT, **constants}


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


def dequantize(capability, **changes):
    arguments = {
        "layer": ROWS,
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


def changed(arguments, changes):
    """Arguments with other values: by name, or by ``group.member``."""
    arguments = dict(arguments)
    for key, value in changes.items():
        name, _, member = key.partition(".")
        if isinstance(value, list):  # JSON has no tuples
            value = tuple(value)
        if member:
            group = arguments[name]
            change = replace if isinstance(group, LayerKind) else type(group)._replace
            value = change(group, **{member: value})
        arguments[name] = value
    return arguments


def compiled(kernel, capability, arguments, **options):
    """Compile with pointers and sizes as they are on a device: aligned pointers, 32-bit sizes.

    Args:
        arguments: of the kernel, with a type for every tensor and number. A number is passed as a constant, which is
            what the launcher does with a size of 1.
    """
    constants, aligned = {}, {}

    def signature(value, path):
        if isinstance(value, tuple):
            members = [signature(member, (*path, place)) for place, member in enumerate(value)]
            return type(value)(*members) if hasattr(value, "_fields") else tuple(members)
        if kernel.params[path[0]].is_constexpr or not isinstance(value, str):
            constants[path] = value
            return "constexpr"
        if value.startswith("*"):
            aligned[path] = [["tt.divisibility", 16]]
        return value

    types = {name: signature(arguments[name], (place,)) for place, name in enumerate(kernel.arg_names)}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def dump(cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", "--dump-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def loops(sass):
    """Operations of every innermost loop, in the order of the program.

    A loop is what lies between a branch backwards and its target; the compiler's last instruction, which branches to
    itself, is none.
    """
    line = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*)")
    code = [(int(m[1], 16), m[2], m[3]) for m in map(line.match, sass.splitlines()) if m]
    spans = []
    for address, name, arguments in code:
        target = re.search(r"0x([0-9a-f]+)", arguments) if name.split(".")[0] == "BRA" else None
        if target and int(target[1], 16) < address:
            spans.append((int(target[1], 16), address))
    inner = [s for s in spans if not any(s != t and s[0] <= t[0] and t[1] <= s[1] for t in spans)]
    return [Counter(name.split(".")[0] for at, name, _ in code if a <= at <= b) for a, b in sorted(inner)]


def describe(kernel):
    said = dump(kernel.asm["cubin"])
    resources = dict(re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", said))
    offsets = re.findall(r"%(\w+_ptr)\w* = tt\.addptr %\w+, %\S+ : !tt\.ptr<\w+>, (i\d+)", kernel.asm["ttir"])
    return {
        "registers": int(resources["REG"]),
        "stack": int(resources["STACK"]),
        "local": int(resources["LOCAL"]),
        "loops": loops(said),
        "offsets": offsets,
    }


KERNELS = {f.__name__: f for f in (decode, small_batch, dequantize, prepare_limbs, prepare_floats)}

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
