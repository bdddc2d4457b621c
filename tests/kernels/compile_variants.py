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
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sab_kernels.decode import decode_kernel
from sab_kernels.dequantize import dequantize_kernel
from sab_kernels.prepare import prepare_floats_kernel, prepare_limbs_kernel
from sab_kernels.small_batch import small_batch_kernel

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
LAYER = {"BASE": 1, "RESIDUAL": 1, "BLOCK_SIZE": 128, "SLOTS_PER_BLOCK": 1, "FP8": True}
STACKED = {f"{name}{i}_ptr": "*bf16" for name in ("bias", "out") for i in range(4)}
POINTERS = {
    "weight_ptr": "*i32",
    "residual_ptr": "*i32",
    "row_scale_ptr": "*u8",
    "row_exponent_ptr": "*i8",
    "base_limb_ptr": "*i8",
    "base_start_ptr": "*i32",
    "base_unit_ptr": "*fp32",
    "slot_limb_ptr": "*i8",
    "slot_start_ptr": "*i32",
    "slot_unit_ptr": "*fp32",
    "partial_ptr": "*fp32",
    "counter_ptr": "*i32",
    "column_scale_ptr": "*i16",
    "index_ptr": "*i32",
    "place_ptr": "*i32",
    "x_ptr": "*bf16",
    "out_ptr": "*bf16",
    **STACKED,
}


def decode(capability, **changes):
    constants = {
        **LAYER,
        "SCALE_COLUMNS": 128,
        "NATIVE_FP8": capability >= 89,
        "HAS_BIAS": True,
        "STACK": 3,
        "TILES": 2,
        "TOKENS": 4,
        "SLOT_TOKENS": 2,
        "SPLIT": 4,
        "UNROLL": 1,
        "ASM": True,
    }
    return compiled(decode_kernel, capability, constants, changes, num_warps=1, num_stages=1)


def small_batch(capability, warps=4, **changes):
    constants = {
        **LAYER,
        "NATIVE_FP8": capability >= 89,
        "HAS_BIAS": True,
        "STACK": 3,
        "TILES": warps,
        "TOKENS": 16,
        "SPLIT": 4,
        "WIDE_LANES": not (capability // 10 == 9 and warps % 4 == 0),
        "PRECISION": "ieee",
        "ASM": True,
    }
    return compiled(small_batch_kernel, capability, constants, changes, num_warps=warps, num_stages=3)


def dequantize(capability, **changes):
    constants = {
        **LAYER,
        "NATIVE_FP8": capability >= 89,
        "TILES": 4,
        "WIDE_LANES": capability // 10 != 9,
        "ASM": True,
    }
    return compiled(dequantize_kernel, capability, constants, changes, num_warps=4, num_stages=1)


def prepare_limbs(capability, **changes):
    constants = {"COUNTERS_EACH": 1, "TOKENS": 4, "SLOT_TOKENS": 2, "SCALE_COLUMNS": 128}
    return compiled(prepare_limbs_kernel, capability, constants, changes)


def prepare_floats(capability, **changes):
    constants = {"COUNTERS_EACH": 1, "TOKENS": 16, "WIDE_LANES": capability < 90}
    return compiled(prepare_floats_kernel, capability, constants, changes)


def compiled(kernel, capability, constants, changes, **options):
    """Compile with pointers and sizes as they are on a device: aligned pointers, 32-bit sizes.

    Args:
        changes: other constants; numbers that are no constants of the kernel are passed as ones, which is what the
            launcher does with an argument of 1; a string is a pointer's type.
    """
    types = {name: value for name, value in changes.items() if isinstance(value, str) and name.endswith("_ptr")}
    constants = {**constants, **{name: value for name, value in changes.items() if name not in types}}
    signature = {
        name: "constexpr" if name in constants else types.get(name, POINTERS.get(name, "i32"))
        for name in kernel.arg_names
    }
    aligned = {(place,): [["tt.divisibility", 16]] for place, kind in enumerate(signature.values()) if kind[0] == "*"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def dump(cubin, what):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([CUOBJDUMP, what, file.name], capture_output=True, text=True, check=True).stdout


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
    resources = dict(re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", dump(kernel.asm["cubin"], "--dump-resource-usage")))
    offsets = re.findall(r"tt\.addptr %(\w+_ptr)\w*, %\S+ : !tt\.ptr<\w+>, (i\d+)", kernel.asm["ttir"])
    return {
        "registers": int(resources["REG"]),
        "stack": int(resources["STACK"]),
        "local": int(resources["LOCAL"]),
        "loops": loops(dump(kernel.asm["cubin"], "--dump-sass")),
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
