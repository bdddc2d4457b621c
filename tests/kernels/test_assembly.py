"""The inline assembly of the kernels, run by a small interpreter of the instructions it uses.

Triton's interpreter takes another branch than a GPU does; these tests hold the two to the same function. What the
matrix instructions make of the operands is tested on a GPU.
"""

import ast
import inspect

import pytest
import torch

pytest.importorskip("triton")
from sab_kernels import coded, operand
from sab_kernels.code_words import pair_words

TABLES = (0xFF00FF00, 0xFFFF0000, 0x01010101)  # even, pair, ones


def assembly(function, **formats):
    """The assembly string in the source of a jitted function."""
    source = inspect.getsource(getattr(function, "fn", function))
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.inline_asm_elementwise":
            code = node.args[0]
            if isinstance(code, ast.BinOp):  # "..." % NAME
                return ast.literal_eval(code.left) % formats[ast.unparse(code.right)]
            return ast.literal_eval(code)
    raise AssertionError("no inline assembly in the function")


def prmt(a, b, c):
    """PTX ISA, prmt.b32 in its default mode."""
    table = a | b << 32
    result = 0
    for i in range(4):
        selector = c >> 4 * i & 15
        byte = table >> 8 * (selector & 7) & 255
        if selector & 8:
            byte = 255 if byte & 128 else 0
        result |= byte << 8 * i
    return result


def lop3(a, b, c, table):
    """PTX ISA, lop3.b32: bit by bit, the table's entry that the three operands' bits number."""
    result = 0
    for i in range(32):
        entry = (a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1
        result |= (table >> entry & 1) << i
    return result


OPERATIONS = {
    "prmt.b32": prmt,
    "lop3.b32": lop3,
    "and.b32": lambda a, b: a & b,
    "shr.b32": lambda a, n: a >> n,
    "shr.u32": lambda a, n: a >> n,
    "shl.b32": lambda a, n: a << n & 0xFFFFFFFF,
    "mov.b32": lambda a: a & 0xFFFFFFFF,
    "xor.b32": lambda a, b: a ^ b,
    "shf.l.wrap.b32": lambda a, b, n: (b << n | a >> 32 - n) & 0xFFFFFFFF,
}


def run(code, operands):
    """Run assembly on 32-bit registers: operands by number, outputs among them unset. Returns the registers."""
    registers = {f"${n}": value for n, value in operands.items()}
    for statement in code.strip().strip("{}").split(";"):
        words = statement.strip().replace(",", " ").split()
        if not words or words[0].startswith("."):
            continue
        name, target, *arguments = words
        values = [registers[a] if a in registers else int(a, 0) for a in arguments]
        registers[target] = OPERATIONS[name](*values)
    return registers


def random_words(count, seed=0):
    return torch.randint(0, 2**32, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_byte_operands_are_what_the_plain_branch_computes():
    code = assembly(operand.load_byte_operands)
    for word in random_words(200):
        operands = {8: word, **{9 + 4 * i: table for i, table in enumerate(TABLES)}}
        found = run(code, operands)
        for step in range(4):
            for half in range(2):
                for i in range(4):
                    bit = word >> (16 * half + 4 * i + step) & 1
                    expected = 1 - bit if step == 3 else -bit
                    assert found[f"${2 * step + half}"] >> 8 * i & 255 == expected & 255


@pytest.mark.parametrize("step", range(4))
def test_flip_gives_the_scale_the_sign_of_both_halves_bits(step):
    for i in range(4):
        code = assembly(operand._flip, SHIFT=15 - 4 * i - step)
        for word, scale in zip(random_words(50), random_words(50, 1)):
            found = run(code, {1: word, 2: scale})["$0"]
            for half in range(2):
                sign = scale >> (16 * half + 15) & 1
                bit = word >> (16 * half + 4 * i + step) & 1
                assert found >> (16 * half + 15) & 1 == (sign if bit else 1 - sign)
                assert (found ^ scale) >> 16 * half & 0x7FFF == 0


def test_flip_shifts_are_those_of_the_plain_branch():
    source = inspect.getsource(operand.load_float_operands.fn)
    for i, shift in enumerate((15, 11, 7, 3)):
        assert f"i{i} = _flip(words, half_scale, {shift} - STEP)" in source


def test_fp8_scales_become_fp16_of_the_same_value():
    """Every e4m3 bit pattern but NaN, 2⁻⁸ times its value."""
    code = assembly(operand.scale_of_bits)
    for first in range(0, 256, 4):
        found = run(code, {2: sum((first + i) << 8 * i for i in range(4))})
        halves = [found[f"${n}"] >> 16 * h & 0xFFFF for n in range(2) for h in range(2)]
        bits = torch.arange(first, first + 4, dtype=torch.uint8)
        expected = bits.view(torch.float8_e4m3fn).float() * 2.0**-8
        values = torch.tensor(halves, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
        real = ~torch.isnan(expected)
        assert torch.equal(values[real], expected[real])
        assert torch.equal(torch.signbit(values[real]), torch.signbit(expected[real]))


def test_table_arguments_are_the_tables():
    from sab_kernels.decode import BYTE_TABLES

    assert tuple(value & 0xFFFFFFFF for value in BYTE_TABLES) == TABLES


CODES = [
    (0b10011, 0b00100),
    (0b11001, 0b10111),
    (0b1011, 0b1),
    (0b1, 0b110),
    (1 << 30 | 1, 1 << 30 | 2),
    (0b100, 0b11011),
]


def derived_bit(word, before, taps, column):
    """A derived plane's bit, by the definition."""
    row = word << 32 | before
    return sum(row >> (32 + column - k) & 1 for k in range(taps.bit_length()) if taps >> k & 1) % 2


@pytest.mark.parametrize("code", CODES)
def test_pairs_of_bits_are_the_derived_planes_of_odd_and_of_even_columns(code):
    text = pair_words(code, "$8", "$9") % 0
    for word, before in zip(random_words(20), random_words(20, 1)):
        found = run(text, {8: word, 9: before})
        for column in range(32):
            bits = [derived_bit(word, before, taps, column) for taps in code]
            pair = found["x" if column % 2 else "y"] >> column // 2 * 2 & 3
            assert pair == 2 * bits[0] + bits[1]


def byte_assembly():
    """The inversions and the assembly that follows the words of pairs, by the number of classes."""
    tree = ast.parse(inspect.getsource(coded.load_coded_byte_operands.fn))
    parts = [n.value for n in ast.walk(tree) if isinstance(n, ast.AnnAssign) and ast.unparse(n.target) == "PAIRS"]
    parts.sort(key=lambda part: part.lineno)
    found = [(ast.literal_eval(part.left.right), ast.literal_eval(part.right)) for part in parts]
    return dict(zip((4, 2, 1), found, strict=True))


@pytest.mark.parametrize("classes", [1, 2, 4])
@pytest.mark.parametrize("code", CODES)
def test_coded_byte_operands_are_pairs_times_a_power_of_four(code, classes):
    flips, rest = byte_assembly()[classes]
    text = pair_words(code, "$8", "$9") % flips + rest
    for word, before in zip(random_words(20), random_words(20, 1)):
        found = run(text, {8: word, 9: before})
        for step in range(4):
            for half in range(2):
                for i in range(4):
                    column = 8 * i + 2 * step + half
                    bits = [derived_bit(word, before, taps, column) for taps in code]
                    pair = 2 * bits[0] + bits[1] - (2 if classes == 4 and step == 3 else 0)
                    expected = pair * 4 ** (step * classes // 4 * (4 // classes))
                    assert found[f"${2 * step + half}"] >> 8 * i & 255 == expected & 255


@pytest.mark.parametrize("code", CODES)
def test_halves_of_pairs_are_what_shifts_bring_to_the_top(code):
    """Of words with an even column in the lower half and the next one in the upper half."""
    text = pair_words(code, "$2", "$3") % 0 + " prmt.b32 $0, y, x, 0x5410; prmt.b32 $1, y, x, 0x7632;"
    assert text.partition(" prmt")[2] in inspect.getsource(coded.load_coded_float_operands.fn)
    for word, before in zip(random_words(20), random_words(20, 1)):
        found = run(text, {2: word, 3: before})
        for step in range(4):
            for i in range(4):
                shift = (14, 6)[i % 2] - 2 * step
                for half in range(2):
                    bits = [derived_bit(word, before, taps, 8 * i + 2 * step + half) for taps in code]
                    top = found[f"${i // 2}"] >> 16 * half & 0xFFFF
                    assert [top << shift >> 15 & 1, top << shift + 1 >> 15 & 1] == bits
