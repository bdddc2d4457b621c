"""Codes of two planes as instructions (coded.py): what is decided before a kernel is compiled."""

ODD = "0xAAAAAAAA"  # bits of P₁ in a word of pairs
MOST_MEMORY = 30  # in the word before, with a bit to spare for the column before


def shifts_of(taps: int) -> list[int]:
    """How far back the bits are that a derived plane is the xor of."""
    return [k for k in range(taps.bit_length()) if taps >> k & 1]


def check_code(code: tuple[int, ...]) -> None:
    """Refuse a code that the kernels do not compute with.

    Raises:
        NotImplementedError: it does not make two planes, or looks back further than a word.
    """
    if code and (len(code) != 2 or not all(0 < taps < 2 << MOST_MEMORY for taps in code)):
        raise NotImplementedError(
            f"code {code}: the kernels compute with codes that make two planes of bits at most {MOST_MEMORY} back."
        )


def pair_words(code: tuple[int, ...], word: str, before: str) -> str:
    """PTX that makes x and y (coded.py) of a word of u and the one before it; ``%d`` stands for bits to invert: an odd
    one and the one below invert that bit of both.

    What both planes of a code have in common at the distance of one bit is computed once; bits of P₁ are never bit 0,
    so those of y are those of x shifted.
    """

    def xor(target: str, shifts: set[int], more: int) -> list[str]:
        lines = []
        for k in sorted(shift + more for shift in shifts):
            if k < 0:  # only ever used at bits whose next one is in the word
                lines.append(f"shr.b32 m, {word}, 1;")
            elif k > 0:
                lines.append(f"shf.l.wrap.b32 m, {before}, {word}, {k};")
            lines.append(f"xor.b32 {target}, {target}, {'m' if k else word};")
        return lines

    first, second = (set(shifts_of(taps)) for taps in code)
    second = {k - 1 for k in second}  # at the bit below
    both, first, second = first & second, first - second, second - first
    lines = [".reg .b32 x, y, t, s, m;", "mov.b32 t, %d;", *xor("t", first, 0), "and.b32 x, t, " + ODD + ";"]
    lines += ["shl.b32 y, t, 1;", "and.b32 y, y, " + ODD + ";"]
    lines += [*xor("x", both, 0), *xor("y", both, 1)]
    for pairs, more in (("x", 0), ("y", 1)):
        if second:
            lines += ["mov.b32 s, 0;", *xor("s", second, more), "and.b32 s, s, 0x55555555;"]
            lines.append(f"xor.b32 {pairs}, {pairs}, s;")
    return " ".join(lines)
