"""What the compiler makes of the kernels, for devices that need not be there.

Needs only torch, Triton and the kernels, so that it runs under any Triton by hand.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SCRIPT = Path(__file__).with_name("compile_variants.py")
pytestmark = pytest.mark.skipif(not CUOBJDUMP.is_file(), reason=f"Triton came without {CUOBJDUMP}")

CAPABILITIES = [80, 90]
SHARED_MEMORY = {"LDS", "STS", "LDSM", "SHFL"}
# one base and one residual plane, fp8, blocks of 128, three stacked layers, columns split in 4 (compile_variants.py)
DECODE = {
    "decode 1 tile": {"TILES": 1},
    "decode 2 tiles": {},
    "decode 4 tokens 1 tile": {"TILES": 1, "SLOT_TOKENS": 4},
    "decode 4 tokens 2 tiles": {"SLOT_TOKENS": 4},
    "decode 8 tokens 1 tile": {"TILES": 1, "TOKENS": 8, "SLOT_TOKENS": 8},
}
CODE = {"KIND.code": [0b10011, 0b00100]}
CODE_BESIDE = {"KIND.code": [0b11001, 0b10111]}  # for a coded plane beside a free one
CODED_DECODE = {
    "decode coded 1 token": {**CODE, "CLASSES": 4},
    "decode coded 2 tokens": {**CODE, "CLASSES": 2},
    "decode coded 4 tokens": {**CODE, "SLOT_TOKENS": 4},
    "decode coded 8 tokens": {**CODE, "TILES": 1, "TOKENS": 8, "SLOT_TOKENS": 8},
    "decode coded beside 1 token": {**CODE_BESIDE, "KIND.base_planes": 2, "CLASSES": 4},
}
EXPERT_DECODE = {
    "expert decode": {},
    "expert decode coded": {**CODE, "CLASSES": 4},
    "expert decode of 4": {"TILED": True, "SLOT_TOKENS": 4},
    "expert decode of 8": {"TILED": True, "TILES": 1, "TOKENS": 8, "SLOT_TOKENS": 8},
    "expert decode of 4 coded": {**CODE, "TILED": True, "SLOT_TOKENS": 4},
}
DENSE_OF_EXPERT = {
    "expert decode": "decode 2 tiles",
    "expert decode coded": "decode coded 1 token",
    "expert decode of 4": "decode 4 tokens 2 tiles",
    "expert decode of 4 coded": "decode coded 4 tokens",
}
PLAIN = {"KIND.residual_planes": 0, "KIND.slots_per_block": 0, "KIND.block_size": 512}
PLAIN |= {"HAS_BIAS": False, "STACK": 1, "SPLIT": 1}
FP16_SCALES = {"KIND.fp8": False, "layer.row_scale": "*i16", "layer.row_exponent": "*i32"}
CODED_FINE = {**FP16_SCALES, **CODE_BESIDE, "KIND.base_planes": 2}
FINE = {**FP16_SCALES, "KIND.base_planes": 2, "KIND.residual_planes": 2, "KIND.block_size": 32, "STACK": 4}
# sizes of 1, which the launcher makes constants
SMALL_LAYER = {f"extent.{name}": 1 for name in ("column_tiles", "slot_tiles", "blocks")}
SMALL = {**SMALL_LAYER, "bounds": [1, 1, 1], "rows": 1, "tokens": 1, "STACK": 1, "SPLIT": 1}
SMALL_EXPERTS = {**SMALL, "row_tiles": 1, "routing.experts": 1, "routing.repeats": 1}
SMALL_INPUTS = {f"inputs.{name}": 1 for name in ("tokens", "columns", "stride")} | {"column_tiles": 1, "counters": 1}
SMALL_PAIRS = {**SMALL_LAYER, "routing.experts": 1, "routing.repeats": 1, "counters": 1}
SMALL_PAIRS |= {name: 1 for name in SMALL_INPUTS if "." in name}
FP16 = {"biases": ["*fp16"] * 4, "outputs": ["*fp16"] * 4, "x_ptr": "*fp16"}
FP32 = {"biases": ["*fp32"] * 4, "outputs": ["*fp32"] * 4, "x_ptr": "*fp32", "PRECISION": "tf32x3"}

VARIANTS = {
    **{name: ("decode", changes) for name, changes in DECODE.items()},
    **{name: ("decode", changes) for name, changes in CODED_DECODE.items()},
    **{name: ("expert_decode", changes) for name, changes in EXPERT_DECODE.items()},
    "expert batch of 16": ("expert_batch", {}),
    "expert batch of 64": ("expert_batch", {"TOKENS": 64}),  # the most there may be
    "expert batch of 64 coded": ("expert_batch", {**CODE, "TOKENS": 64}),
    "prepare expert limbs": ("prepare_expert_limbs", {}),
    "prepare expert floats": ("prepare_expert_floats", {}),
    "tile table": ("tile_table", {}),
    "small batch of 16": ("small_batch", {}),
    "small batch coded": ("small_batch", CODE),
    "dequantize coded": ("dequantize", CODE),
    "dequantize": ("dequantize", {}),
    "dequantize fine": ("dequantize", {**FP16_SCALES, "KIND.base_planes": 2, "KIND.residual_planes": 2}),
    "prepare limbs": ("prepare_limbs", {}),
    "prepare limbs of 8 tokens": ("prepare_limbs", {"TOKENS": 8, "SLOT_TOKENS": 8, "SCALE_COLUMNS": 32}),
    "prepare floats": ("prepare_floats", {}),
    "columns": ("columns", {}),
    "columns in a descent": ("columns", {"DESCENT": True}),
}
# one capability is enough for these
FURTHER = {
    80: {
        "small batch of 32": ("small_batch", {"TOKENS": 32}),  # the most that configs/devices.json launches there
        "decode small": ("decode", {**SMALL, "TILES": 1}),
        "small batch small": ("small_batch", {**SMALL, "row_tiles": 1}),
        "dequantize small": ("dequantize", {**SMALL_LAYER, "first_tile": 1, "rows": 1, "columns": 1, "row_tiles": 1}),
        "prepare limbs small": ("prepare_limbs", SMALL_INPUTS),
        "prepare floats small": ("prepare_floats", {**SMALL_INPUTS, "COUNTERS_EACH": 4}),
        "small batch fp32": ("small_batch", FP32),
        "expert batch fp32": ("expert_batch", FP32),
        "expert decode small": ("expert_decode", {**SMALL_EXPERTS, "TILES": 1}),
        "expert batch small": ("expert_batch", SMALL_EXPERTS),
        "prepare expert limbs small": ("prepare_expert_limbs", SMALL_PAIRS),
        "prepare expert floats small": ("prepare_expert_floats", {**SMALL_PAIRS, "TOKENS": 16}),
        "tile table small": ("tile_table", dict.fromkeys(("pairs", "experts", "tiles", "steps"), 1)),
    },
    90: {
        "small batch of 64": ("small_batch", {"TOKENS": 64}),
        "small batch coded fp16": ("small_batch", {**FP16_SCALES, **CODE, **FP16}),
        "decode coded fine": ("decode", {**CODED_FINE, "CLASSES": 4}),
        "dequantize coded fine": ("dequantize", CODED_FINE),
        "prepare limbs coded": ("prepare_limbs", {"CLASSES": 4}),
        "prepare floats coded": ("prepare_floats", {"CODED": True}),
        "decode unrolled": ("decode", {"UNROLL": 2}),
        "decode without residual": ("decode", PLAIN),
        "decode fine": ("decode", {**FINE, "SCALE_COLUMNS": 32, "TILES": 1}),
        "dequantize without residual": (
            "dequantize",
            {"KIND.residual_planes": 0, "KIND.slots_per_block": 0, "KIND.block_size": 96},
        ),
        "small batch fine": ("small_batch", {**FINE, "KIND.base_planes": 1, "KIND.residual_planes": 1, "warps": 1}),
    },
}
COMPILED = {capability: {**VARIANTS, **FURTHER[capability]} for capability in CAPABILITIES}
# A variant takes seconds to compile. The ordinary run has of each kernel, for one capability, the one that needs the
# most registers, and for the other the ordinary ones too, where another test asks for more than their registers.
SAMPLE = {
    80: {"decode 2 tiles", "small batch of 32", "dequantize fine", "prepare limbs of 8 tokens", "prepare floats"},
    90: {
        *(
            "decode coded 1 token",
            "decode coded beside 1 token",
            "small batch coded",
            "dequantize coded",
            "prepare limbs coded",
        ),
        *("decode 1 tile", "decode 2 tiles", "decode 8 tokens 1 tile", "decode fine"),
        *("small batch of 16", "dequantize", "prepare limbs", "columns in a descent"),
        *("expert decode", "expert decode coded", "expert batch of 64", "prepare expert floats", "tile table"),
    },
}


def each(*names, capabilities=CAPABILITIES):
    """Parameters of a test: variants, those that are there by default, for every capability."""
    return pytest.mark.parametrize(
        ("name", "capability"),
        [
            pytest.param(name, capability, marks=[] if name in SAMPLE[capability] else pytest.mark.full)
            for capability in capabilities
            for name in names or COMPILED[capability]
        ],
    )


class Compiled:
    """What compile_variants.py says of a variant, by ``[name, capability]``.

    When it is first asked for, all of its capability are compiled that are in the sample, or all that are not.
    """

    def __init__(self, folder):
        self._folder = folder
        self._found = {}

    def __getitem__(self, key):
        name, capability = key
        if key not in self._found:
            sampled = name in SAMPLE[capability]
            names = [other for other in COMPILED[capability] if (other in SAMPLE[capability]) == sampled]
            found = self._compile(names, capability)
            self._found.update({(other, capability): found[other] for other in names})
        return self._found[key]

    def _compile(self, names, capability):
        variants = {name: COMPILED[capability][name] for name in names}
        wanted = json.dumps({name: (kernel, capability, changes) for name, (kernel, changes) in variants.items()})
        environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(self._folder / str(capability))}
        done = subprocess.run(
            [sys.executable, str(SCRIPT), wanted], env=environment, text=True, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return Compiled(tmp_path_factory.mktemp("cache"))


def matrix_loops(found):
    """The loop over base tiles and that over residual tiles, in the order of the program."""
    loops = [loop for loop in found["loops"] if "IMMA" in loop]
    assert len(loops) == 2, "the kernel has a loop over base tiles and one over residual tiles"
    return loops


def per_stored_bit(found, tiles, base_planes=1):
    """Instructions of a lane, where eight tiles of base planes (32 rows, 128 columns) go with one residual tile."""
    base, residual = matrix_loops(found)
    instructions = 8 * sum(base.values()) + sum(residual.values())
    signs = (8 * base_planes + 1) * tiles * 128
    scales = tiles * 8 * (base_planes + 1) * 8  # of 8 blocks, 8 bits for each plane: 32 rows to 32 lanes
    return instructions / (signs + scales)


@each()
def test_kernel_does_not_spill(compiled, name, capability):
    found = compiled[name, capability]
    assert found["stack"] == 0 and found["local"] == 0, f"{found['registers']} registers were not enough"


@each(*DECODE, *CODED_DECODE, *EXPERT_DECODE)
def test_decode_loop_over_base_tiles_moves_nothing_between_lanes(compiled, name, capability):
    base, _ = matrix_loops(compiled[name, capability])
    assert not SHARED_MEMORY & base.keys()


@each(*DECODE, *CODED_DECODE, *EXPERT_DECODE)
def test_decode_loop_over_residual_tiles_moves_nothing_between_lanes(compiled, name, capability):
    _, residual = matrix_loops(compiled[name, capability])
    assert not SHARED_MEMORY & residual.keys()


@each("decode 2 tiles", "expert decode")
def test_decode_takes_at_most_one_instruction_per_stored_bit(compiled, name, capability):
    """For one or two tokens, and for one pair."""
    assert per_stored_bit(compiled[name, capability], tiles=2) <= 1.0


@each("decode coded 1 token", "decode coded 2 tokens", "decode coded beside 1 token", "expert decode coded")
def test_decode_of_a_coded_layer_takes_about_one_instruction_per_stored_bit(compiled, name, capability):
    """At most one on Hopper."""
    base_planes = COMPILED[capability][name][1].get("KIND.base_planes", 1)
    assert per_stored_bit(compiled[name, capability], 2, base_planes) <= {80: 1.1, 90: 1.0}[capability]


@each(*CODED_DECODE, "expert decode coded", capabilities=[90])
def test_decode_of_a_coded_layer_loads_four_words_at_once(compiled, name, capability):
    """Of two row tiles the words, those before them and scales; activations, and what is added to sums.

    Of a free plane beside the coded one words and scales.
    """
    base, _ = matrix_loops(compiled[name, capability])
    free = COMPILED[capability][name][1].get("KIND.base_planes", 1) - 1
    assert base["LDG"] <= 12 + 6 * free


@each(*DENSE_OF_EXPERT, capabilities=[90])
def test_decode_of_experts_takes_no_more_instructions_than_that_of_one_layer(compiled, name, capability):
    """Up to what the compiler makes of other addresses: a twentieth."""
    most = per_stored_bit(compiled[DENSE_OF_EXPERT[name], capability], tiles=2) * 1.05
    assert per_stored_bit(compiled[name, capability], tiles=2) <= most


@each("expert batch of 16", "expert batch of 64")
def test_small_batch_of_experts_stores_no_operand_of_weights(compiled, name, capability):
    """Activations come from shared memory, copied there past the registers."""
    loops = [loop for loop in compiled[name, capability]["loops"] if {"HGMMA", "HMMA"} & loop.keys()]
    assert len(loops) == 2
    assert not any({"STS", "SHFL"} & loop.keys() for loop in loops)


@each(*DECODE, "expert decode", "expert decode of 4", "expert decode of 8", capabilities=[90])
def test_decode_unpacks_four_weights_by_one_instruction(compiled, name, capability):
    """32 permutations make the 128 weights that a lane has of a tile; Hopper converts fp8 without further ones."""
    base, _ = matrix_loops(compiled[name, capability])
    assert base["PRMT"] <= 36 * {**DECODE, **EXPERT_DECODE}[name].get("TILES", 2)


@each("decode 2 tiles", "small batch of 16", "dequantize", "expert decode", "expert batch of 64", capabilities=[90])
@pytest.mark.parametrize("pointer", ["weight_ptr", "residual_ptr", "row_scale_ptr"])
def test_row_tiles_are_addressed_with_64_bits(compiled, name, pointer, capability):
    offsets = [bits for found, bits in compiled[name, capability]["offsets"] if found == pointer]
    assert offsets[0] == "i64"
