"""Packaging. Tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

# optimum-cli finds commands in `optimum/commands/register/*.py` over all distributions. `optimum` is a namespace
# package of several distributions, so nothing shipped here may put an `__init__.py` under it, and the folder that is
# mapped has none either: that is why `find_packages` does not see it and it is named here.
REGISTER_PACKAGE = "optimum.commands.register"

QUANTIZE = ["accelerate>=1.0", "greenlet>=3.0", "jinja2>=3.1", "pillow>=10.0", "tqdm>=4.60"]
DOCS = ["mkdocs-material>=9.7", "mkdocstrings-python>=2.0"]
ADAPTERS = ["accelerate>=1.0", "peft>=0.21"]
REPORT = ["jinja2>=3.1", "matplotlib>=3.8", "pillow>=10.0"]
TEST = [
    *QUANTIZE,
    *ADAPTERS,
    *REPORT,
    "hypothesis>=6.100",
    "optimum>=2.0",
    "pytest>=8.0",
    "pytest-xdist>=3.5",
    "triton>=3.2; platform_system == 'Linux'",
]


def read_version() -> str:
    """The version in optimum_sab/version.py, without importing the package (which imports torch)."""
    source = (ROOT / "optimum_sab" / "version.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    if match is None:
        raise RuntimeError('optimum_sab/version.py must hold a line like: __version__ = "0.1.0"')
    return match.group(1)


setup(
    name="optimum-sab",
    version=read_version(),
    description="Significance-aware binarization of vision-language models inside Transformers' from_pretrained",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["transformers", "quantization", "binarization", "vision-language models", "optimum"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=[
        *find_packages(include=["optimum_sab", "optimum_sab.*"]),
        *find_packages("kernels/torch-ext"),
        REGISTER_PACKAGE,
    ],
    package_dir={
        "sab_kernels": "kernels/torch-ext/sab_kernels",
        REGISTER_PACKAGE: "optimum_sab/cli/register",
    },
    package_data={
        "optimum_sab": ["py.typed"],
        "sab_kernels": ["configs/*.json"],
        "optimum_sab.data": ["*.txt"],
        "optimum_sab.eval.reader": ["*.safetensors"],
        "optimum_sab.example": ["checkpoint/*"],
        "optimum_sab.ops.cpu": ["*.c", "*.h"],
        "optimum_sab.report": ["templates/*.html"],
    },
    # Loading a packed checkpoint needs these and nothing else.
    install_requires=["torch>=2.6", "transformers>=4.57,<6", "safetensors>=0.4.3", "numpy>=1.24"],
    extras_require={
        "quantize": QUANTIZE,
        "adapters": ADAPTERS,
        "eval": QUANTIZE,
        "report": REPORT,
        "optimum": ["optimum>=2.0"],
        "docs": DOCS,
        "test": TEST,
        "dev": [*TEST, "jaxtyping>=0.2.30", "mypy>=1.11", "ruff>=0.6"],
    },
    entry_points={"console_scripts": ["optimum-sab = optimum_sab.cli.main:main"]},
    zip_safe=False,
)
