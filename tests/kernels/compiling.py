"""Compile a kernel for a device that need not be there, and say what came out."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sab_kernels.arguments import LayerKind

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


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
