"""No function takes more arguments than a reader can hold: what belongs together is one object."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = (ROOT / "optimum_sab", ROOT / "kernels" / "torch-ext" / "sab_kernels")
MOST = 6

# Being rewritten; to be taken out.
NOT_YET = ("optimum_sab/calibration/", "optimum_sab/hf/", "optimum_sab/eval/reader/")

# Functions whose arguments are a user's options, by file and name, and why they may have more.
USERS_OPTIONS = {
    "optimum_sab/hf/config.py::SABConfig.__init__": "one argument per setting, as every Transformers configuration",
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(tree: ast.AST, inside: str = "") -> Iterator[tuple[str, Function]]:
    """Every function and method with its dotted name, also inside others."""
    for node in ast.iter_child_nodes(tree):
        name = inside
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            name = f"{inside}.{node.name}".lstrip(".")
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield name, node
        yield from functions(node, name)


def is_kernel(function: Function) -> bool:
    """Triton's kernels take every pointer and every constant by itself."""
    return any(ast.unparse(each).partition("(")[0] == "triton.jit" for each in function.decorator_list)


def arguments(function: Function) -> list[str]:
    """Names of all arguments but self and cls, those with defaults included; ``*rest`` and ``**rest`` are one each."""
    given = function.args
    names = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    rest = [each.arg for each in (given.vararg, given.kwarg) if each is not None]
    return [name for name in [*names, *rest] if name not in ("self", "cls")]


def too_many(source: str) -> dict[str, int]:
    """Functions with too many arguments, and how many they have."""
    counts = {name: len(arguments(f)) for name, f in functions(ast.parse(source)) if not is_kernel(f)}
    return {name: count for name, count in counts.items() if count > MOST}


def test_functions_take_few_arguments():
    """Constructors of dataclasses are written by Python, and not looked at."""
    found, exempt = [], []
    for path in sorted(path for package in PACKAGES for path in package.rglob("*.py")):
        file = path.relative_to(ROOT).as_posix()
        if file.startswith(NOT_YET):
            continue
        for name, count in too_many(path.read_text(encoding="utf-8")).items():
            place = f"{file}::{name}"
            if place in USERS_OPTIONS:
                exempt.append(place)
            else:
                found.append(f"{place} takes {count} arguments; {MOST} are enough, or make what belongs together one")
    assert found == []
    assert exempt == sorted(place for place in USERS_OPTIONS if not place.startswith(NOT_YET)), "one needs none"


SEVEN = "a, b, c, d, e, f, g"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (f"def solve({SEVEN}): pass", "solve"),
        ("def solve(a, b, c, d=0, e=0, *, f=0, g=0): pass", "solve"),
        ("def solve(a, /, b, c, d, e, *f, **g): pass", "solve"),
        (f"async def solve({SEVEN}): pass", "solve"),
        (f"class Solver:\n    def solve(self, {SEVEN}): pass", "Solver.solve"),
        (f"class Solver:\n    @classmethod\n    def of(cls, {SEVEN}): pass", "Solver.of"),
        (f"def outer():\n    if True:\n        def inner({SEVEN}): pass", "outer.inner"),
        (f"@cache\ndef solve({SEVEN}): pass", "solve"),
    ],
)
def test_function_with_seven_arguments_is_found(source, name):
    assert too_many(source) == {name: 7}


@pytest.mark.parametrize(
    "source",
    [
        "def solve(a, b, c, d, e, f): pass",
        "class Solver:\n    def solve(self, a, b, c, d, e, f): pass",
        f"@triton.jit\ndef kernel({SEVEN}): pass",
        f"@triton.jit(noinline=True)\ndef kernel({SEVEN}): pass",
        "@dataclass\nclass Settings:\n" + "".join(f"    {name}: int\n" for name in "abcdefg"),
    ],
)
def test_function_with_few_arguments_and_kernel_are_allowed(source):
    assert too_many(source) == {}
