"""No function takes more than six arguments: what belongs together travels as a frozen dataclass."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MOST = 6
# Each of these arguments is one that a user sets, by name.
OPTIONS_OF_A_USER = {("optimum_sab/hf/config.py", "__init__")}


def parameters(function):
    """Names of a function's parameters, without self and cls."""
    arguments = function.args
    names = [each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls")]


def is_kernel(function):
    """A Triton kernel, or a function inside of one: those are given numbers and pointers."""
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def crowded(source):
    """Functions of a module with more than `MOST` parameters, as (name, line, parameters)."""
    functions = [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    return [
        (each.name, each.lineno, parameters(each))
        for each in functions
        if not is_kernel(each) and len(parameters(each)) > MOST
    ]


def test_no_function_takes_more_arguments_than_one_can_keep_apart():
    found = []
    for folder in (ROOT / "optimum_sab", ROOT / "kernels"):
        for path in sorted(folder.rglob("*.py")):
            place = path.relative_to(ROOT).as_posix()
            for name, line, names in crowded(path.read_text(encoding="utf-8")):
                if (place, name) not in OPTIONS_OF_A_USER:
                    found.append(f"{place}:{line}: {name} takes {len(names)}: {', '.join(names)}")
    assert found == []


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("def f(a, b, c, d, e, f): ...", 0),
        ("def f(a, b, c, d, e, f, g=None): ...", 1),
        ("def f(a, b, c, d, *, e, f, g): ...", 1),
        ("class A:\n    def f(self, a, b, c, d, e, f): ...", 0),
        ("def outer():\n    async def f(a, b, c, /, d, e, f, g): ...", 1),
        ("@triton.jit\ndef kernel(a, b, c, d, e, f, g): ...", 0),
    ],
)
def test_parameters_are_counted(source, count):
    assert len(crowded(source)) == count
