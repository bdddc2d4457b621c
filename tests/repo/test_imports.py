"""Imports run one way and in no circle, and the top level of the repository holds what it is meant to hold."""

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "optimum_sab"
KERNELS = ROOT / "kernels" / "torch-ext" / "sab_kernels"

# A module may import its own layer and the layers before it.
LAYERS = (
    ("version", "errors", "after_import", "sources", "explanation", "failure", "json_values", "wording"),
    ("core",),
    ("presets",),
    ("format",),
    ("ops",),
    ("nn",),
    ("data", "report"),
    ("calibration",),
    ("hf",),
    ("example",),
    ("eval", "bench"),
    ("cli", "__main__", ""),  # "" is optimum_sab/__init__.py
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

# Below hf, Transformers is needed only to run a processor.
TRANSFORMERS = ("transformers", "tokenizers", "huggingface_hub", "optimum")
MAY_IMPORT_TRANSFORMERS = ("optimum_sab.calibration.samples",)
# core is mathematics on tensors.
CORE_PACKAGES = ("torch", "numpy", "jaxtyping", "optimum_sab")
KERNEL_PACKAGES = ("torch", "triton", "sab_kernels")

TOP_LEVEL = {
    "optimum_sab",
    "kernels",
    "tests",
    "docs",
    "findings",
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "mkdocs.yml",
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "constraints.txt",
    "constraints-4.57.txt",
}


@dataclass(frozen=True)
class Import:
    """One imported module and where the import stands; with ``from``, also the name that is taken from it."""

    line: int
    module: str
    type_checking: bool
    name: str = ""

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]


@dataclass(frozen=True)
class Module:
    """A module by its dotted name; a package is its ``__init__.py``."""

    name: str
    source: str
    is_package: bool = False


def module_at(path: Path) -> Module:
    """A file of the package or of the kernels."""
    base = KERNELS.parent if path.is_relative_to(KERNELS) else ROOT
    parts = path.relative_to(base).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    return Module(".".join(parts[:-1] if is_package else parts), path.read_text(encoding="utf-8"), is_package)


def is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(module: Module) -> Iterator[Import]:
    """Every import of a module, also inside functions; relative ones with their full names."""

    def base_of(node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        package = module.name if module.is_package else module.name.rpartition(".")[0]
        for _ in range(node.level - 1):
            package = package.rpartition(".")[0]
        return f"{package}.{node.module or ''}".rstrip(".")

    def visit(node: ast.AST, type_checking: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, type_checking)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield Import(node.lineno, base_of(node), type_checking, alias.name)
        elif isinstance(node, ast.If) and is_type_checking(node.test):
            for child in node.body:
                yield from visit(child, True)
            for child in node.orelse:
                yield from visit(child, type_checking)
        else:
            for child in ast.iter_child_nodes(node):
                yield from visit(child, type_checking)

    yield from visit(ast.parse(module.source), False)


def import_graph(modules: Sequence[Module]) -> dict[str, list[str]]:
    """The modules that each one imports, of those given.

    ``from a import b`` imports ``a.b`` where that is a module and ``a`` elsewhere. Importing ``a.b`` also runs ``a``,
    unless the importer is inside ``a``, so that it has been begun before.
    """
    known = {module.name for module in modules}
    graph: dict[str, list[str]] = {}
    for module in modules:
        inside = set(packages_of(module.name))
        found = {}
        for each in imports(module):
            submodule = f"{each.module}.{each.name}"
            target = submodule if submodule in known else each.module
            for name in [target, *(p for p in packages_of(target) if p not in inside and p != module.name)]:
                if name in known:
                    found[name] = None
        graph[module.name] = list(found)
    return graph


def packages_of(name: str) -> list[str]:
    """The packages a module lies in, the innermost first."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]


def import_circle(graph: Mapping[str, Sequence[str]]) -> str | None:
    """A circle as ``a imports b imports a``, or None."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return " imports ".join(reversed(error.args[1]))  # it lists the imported one first
    return None


def layer(module: str) -> str:
    """The part of a module name below `optimum_sab` that decides its rank."""
    return [*module.split("."), ""][1]


def violation(name: str, each: Import) -> str | None:
    """Why the module `name` must not import this, or None."""
    module = each.module
    if module == "optimum_sab" and each.name in RANK:  # `from optimum_sab import core` means the folder
        module = f"{module}.{each.name}"
    if name.partition(".")[0] == "sab_kernels":
        if each.package not in KERNEL_PACKAGES and each.package not in sys.stdlib_module_names:
            return f"kernels import torch, triton and themselves, not {module}"
        return None
    own = layer(name)
    if each.package == "optimum_sab" and RANK[layer(module)] > RANK[own]:
        return f"{own} is below {layer(module) or 'the package itself'} and must not import {module}"
    if each.package == "sab_kernels" and RANK[own] < RANK["ops"]:
        return f"{own} is below ops and must not import {module}"
    if each.package in TRANSFORMERS and RANK[own] < RANK["hf"] and name not in MAY_IMPORT_TRANSFORMERS:
        return f"{own} is below hf and must not import {module}"
    if own == "core" and each.package not in CORE_PACKAGES and each.package not in sys.stdlib_module_names:
        return f"core is plain torch and must not import {module}"
    if each.package == "jaxtyping" and not each.type_checking:
        return "jaxtyping is not installed with the package; import it under `if TYPE_CHECKING:`"
    return None


def modules() -> dict[Path, Module]:
    """Every module of the package and of the kernels."""
    return {path: module_at(path) for path in sorted([*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py")])}


def test_imports_run_one_way():
    found = []
    for path, module in modules().items():
        for each in imports(module):
            reason = violation(module.name, each)
            if reason is not None:
                found.append(f"{path.relative_to(ROOT)}:{each.line}: {reason}")
    assert found == []


def test_every_module_of_the_package_belongs_to_a_layer():
    assert {layer(module_at(path).name) for path in PACKAGE.rglob("*.py")} <= set(RANK)


def test_no_modules_import_each_other_in_a_circle():
    graph = import_graph(list(modules().values()))
    assert "sab_kernels.geometry" in graph["sab_kernels.layout"]  # by a relative import
    assert "optimum_sab.format.layout" in graph["optimum_sab.nn.linear"]
    circle = import_circle(graph)
    assert circle is None


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("optimum_sab.core.planes", "from optimum_sab.format.layout import LAYOUT"),
        ("optimum_sab.core.planes", "import optimum_sab.nn.linear"),
        ("optimum_sab.core.planes", "from ..nn import linear"),
        ("optimum_sab.core.planes", "from optimum_sab import hf"),
        ("optimum_sab.core.planes", "from optimum_sab import SABConfig"),
        ("optimum_sab.core.planes", "def late():\n    from optimum_sab.ops import reference"),
        ("optimum_sab.core.planes", "if TYPE_CHECKING:\n    from optimum_sab.nn.linear import SABLinear"),
        ("optimum_sab.core.planes", "import scipy.linalg"),
        ("optimum_sab.core.planes", "import sab_kernels"),
        ("optimum_sab.core.planes", "from jaxtyping import Float"),
        ("optimum_sab.core.planes", "if TYPE_CHECKING:\n    pass\nelse:\n    from jaxtyping import Float"),
        ("optimum_sab.errors", "from optimum_sab.core import planes"),
        ("optimum_sab.nn.linear", "from transformers import PreTrainedModel"),
        ("optimum_sab.calibration.streams.lockstep", "import transformers.utils"),
        ("optimum_sab.hf.config", "from optimum_sab.eval.measures import agreement"),
        ("optimum_sab.report.page", "from optimum_sab.calibration.report import BinarizationReport"),
        ("optimum_sab.eval.tasks", "from optimum_sab.cli.main import main"),
        ("sab_kernels.decode", "from optimum_sab.core.planes import BinaryPlanes"),
        ("sab_kernels.decode", "import numpy"),
    ],
)
def test_upward_import_is_refused(name, source):
    assert any(violation(name, each) for each in imports(Module(name, source)))


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("optimum_sab.core.planes", "import math\nimport torch\nfrom optimum_sab.errors import ConfigError"),
        ("optimum_sab.core.planes", "from optimum_sab.core.hessian import Hessian"),
        ("optimum_sab.core.planes", "from .hessian import Hessian"),
        ("optimum_sab.core.planes", "if TYPE_CHECKING:\n    from jaxtyping import Float"),
        ("optimum_sab.ops.reference", "import sab_kernels.decode"),
        ("optimum_sab.calibration.samples", "from transformers import ProcessorMixin"),
        ("optimum_sab.hf.config", "from transformers.utils.quantization_config import QuantizationConfigMixin"),
        ("optimum_sab.calibration.report", "from optimum_sab.report.files import write_report"),
        ("optimum_sab.cli.main", "from optimum_sab import SABConfig"),
        ("optimum_sab", "from optimum_sab.hf.config import SABConfig as SABConfig"),
        ("sab_kernels.decode", "import triton\nfrom .layout import BLOCK"),
    ],
)
def test_downward_import_is_allowed(name, source):
    found = list(imports(Module(name, source)))
    assert found != []
    assert [violation(name, each) for each in found] == [None] * len(found)


LATE = "def late():\n    {}"
FOR_TYPES = "if TYPE_CHECKING:\n    {}"
TWO = {"pack": "", "pack.a": "from pack.b import B", "pack.b": "from pack.a import A"}
CIRCLES = {
    "two modules": (TWO, {"pack.a", "pack.b"}),
    "inside a function": ({**TWO, "pack.b": LATE.format("import pack.a")}, {"pack.a", "pack.b"}),
    "for types": ({**TWO, "pack.b": FOR_TYPES.format("from pack.a import A")}, {"pack.a", "pack.b"}),
    "relative": ({**TWO, "pack.b": "from . import a"}, {"pack.a", "pack.b"}),
    "relative with the module": ({**TWO, "pack.b": "from .a import A"}, {"pack.a", "pack.b"}),
    "submodule by its name": ({**TWO, "pack.b": "from pack import a as other"}, {"pack.a", "pack.b"}),
    "three modules": (
        {"pack": "", "pack.a": "import pack.b", "pack.b": "from pack import c", "pack.c": "from .a import A"},
        {"pack.a", "pack.b", "pack.c"},
    ),
    "a package and what it exports": (
        {"pack": "from .a import A as A", "pack.a": "from pack import A"},
        {"pack", "pack.a"},
    ),
    "a package that an import of its module runs": (
        {
            "one": "from .a import A",
            "one.a": "import two.inner.x",
            "two": "from one.b import B",
            "two.inner": "",
            "two.inner.x": "",
            "one.b": "",
        },
        {"one", "one.a", "two"},
    ),
}
STRAIGHT = {
    "a diamond": {
        "pack": "",
        "pack.a": "from pack import b, c",
        "pack.b": "from pack.d import D",
        "pack.c": "from . import d",
        "pack.d": "import os",
    },
    "a package and what it exports": {
        "pack": "from pack.b import B as B\nfrom pack import a",
        "pack.a": "from pack.b import B",
        "pack.b": "",
    },
    "two packages of which one uses the other": {
        "one": "from .a import A",
        "one.a": "from two.x import X\nfrom two import X",
        "two": "from .x import X",
        "two.x": "",
    },
}


def planted(sources):
    """Modules of these sources; a package is what others lie in."""
    packages = {package for name in sources for package in packages_of(name)}
    return [Module(name, source, name in packages) for name, source in sources.items()]


@pytest.mark.parametrize("case", CIRCLES)
def test_circle_of_imports_is_found_and_named(case):
    sources, members = CIRCLES[case]
    graph = import_graph(planted(sources))
    path = import_circle(graph).split(" imports ")
    assert path[0] == path[-1] and set(path) == members and len(path) == len(members) + 1
    assert all(imported in graph[importer] for importer, imported in zip(path, path[1:]))


@pytest.mark.parametrize("case", STRAIGHT)
def test_imports_that_meet_again_are_no_circle(case):
    graph = import_graph(planted(STRAIGHT[case]))
    assert sum(map(len, graph.values())) >= 3
    assert import_circle(graph) is None


def test_no_init_file_stands_in_a_namespace_that_is_not_ours():
    """One in `kernels` shadows Hugging Face's package of that name, one in cli/register breaks optimum."""
    folders = [ROOT / "kernels", KERNELS.parent, PACKAGE / "cli" / "register", ROOT / "tests"]
    assert [folder for folder in folders if (folder / "__init__.py").exists()] == []


def test_top_level_holds_only_the_allowed_names():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    names = {path.partition("/")[0] for path in listing.split("\0") if path}
    assert {name for name in names if not name.startswith(".")} - TOP_LEVEL == set()
