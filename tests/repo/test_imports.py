"""Imports run one way, and the top level of the repository holds what it is meant to hold."""

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "optimum_sab"
KERNELS = ROOT / "kernels" / "torch-ext" / "sab_kernels"

# A module may import its own layer and the layers before it.
LAYERS = (
    ("version", "errors"),
    ("core",),
    ("format",),
    ("ops",),
    ("nn",),
    ("data",),
    ("calibration",),
    ("hf",),
    ("example",),
    ("eval", "bench", "report"),
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
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "constraints.txt",
    "constraints-4.57.txt",
}


@dataclass(frozen=True)
class Import:
    """One imported module and where the import stands."""

    line: int
    module: str
    type_checking: bool

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]


def module_name(path: Path) -> str:
    """The dotted name of a file of the package or of the kernels."""
    base = KERNELS.parent if path.is_relative_to(KERNELS) else ROOT
    parts = path.relative_to(base).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(name: str, source: str, is_package: bool = False) -> Iterator[Import]:
    """Every import of a module, also inside functions; relative ones with their full names."""

    def visit(node: ast.AST, type_checking: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, type_checking)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name if is_package else name.rpartition(".")[0]
                for _ in range(node.level - 1):
                    package = package.rpartition(".")[0]
                base = f"{package}.{base}".rstrip(".")
            if base == "optimum_sab":  # `from optimum_sab import core` may mean a folder or a name of the package
                known = [alias.name if alias.name in RANK else "" for alias in node.names]
                for each in known:
                    yield Import(node.lineno, f"{base}.{each}".rstrip("."), type_checking)
            else:
                yield Import(node.lineno, base, type_checking)
        elif isinstance(node, ast.If) and is_type_checking(node.test):
            for child in node.body:
                yield from visit(child, True)
            for child in node.orelse:
                yield from visit(child, type_checking)
        else:
            for child in ast.iter_child_nodes(node):
                yield from visit(child, type_checking)

    yield from visit(ast.parse(source), False)


def layer(module: str) -> str:
    """The part of a module name below `optimum_sab` that decides its rank."""
    return [*module.split("."), ""][1]


def violation(name: str, each: Import) -> str | None:
    """Why the module `name` must not import this, or None."""
    if name.partition(".")[0] == "sab_kernels":
        if each.package not in KERNEL_PACKAGES and each.package not in sys.stdlib_module_names:
            return f"kernels import torch, triton and themselves, not {each.module}"
        return None
    own = layer(name)
    if each.package == "optimum_sab" and RANK[layer(each.module)] > RANK[own]:
        return f"{own} is below {layer(each.module) or 'the package itself'} and must not import {each.module}"
    if each.package == "sab_kernels" and RANK[own] < RANK["ops"]:
        return f"{own} is below ops and must not import {each.module}"
    if each.package in TRANSFORMERS and RANK[own] < RANK["hf"] and name not in MAY_IMPORT_TRANSFORMERS:
        return f"{own} is below hf and must not import {each.module}"
    if own == "core" and each.package not in CORE_PACKAGES and each.package not in sys.stdlib_module_names:
        return f"core is plain torch and must not import {each.module}"
    if each.package == "jaxtyping" and not each.type_checking:
        return "jaxtyping is not installed with the package; import it under `if TYPE_CHECKING:`"
    return None


def sources() -> list[Path]:
    return sorted([*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py")])


def test_imports_run_one_way():
    found = []
    for path in sources():
        name = module_name(path)
        for each in imports(name, path.read_text(encoding="utf-8"), path.name == "__init__.py"):
            reason = violation(name, each)
            if reason is not None:
                found.append(f"{path.relative_to(ROOT)}:{each.line}: {reason}")
    assert found == []


def test_every_module_of_the_package_belongs_to_a_layer():
    assert {layer(module_name(path)) for path in PACKAGE.rglob("*.py")} <= set(RANK)


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
        ("optimum_sab.calibration.lockstep", "import transformers.utils"),
        ("optimum_sab.hf.config", "from optimum_sab.report.html import write"),
        ("optimum_sab.eval.tasks", "from optimum_sab.cli.main import main"),
        ("sab_kernels.decode", "from optimum_sab.core.planes import BinaryPlanes"),
        ("sab_kernels.decode", "import numpy"),
    ],
)
def test_upward_import_is_refused(name, source):
    assert any(violation(name, each) for each in imports(name, source))


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
        ("optimum_sab.report.html", "from optimum_sab.eval.tasks import Score"),
        ("optimum_sab.cli.main", "from optimum_sab import SABConfig"),
        ("optimum_sab", "from optimum_sab.hf.config import SABConfig as SABConfig"),
        ("sab_kernels.decode", "import triton\nfrom .layout import BLOCK"),
    ],
)
def test_downward_import_is_allowed(name, source):
    found = list(imports(name, source))
    assert found != []
    assert [violation(name, each) for each in found] == [None] * len(found)


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
