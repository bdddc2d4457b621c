"""`optimum-sab example DIR`: the embedded example as a checkpoint folder of its own."""

from __future__ import annotations

import argparse
import shutil

from optimum_sab.example import checkpoint_path
from optimum_sab.hf.output.place import check_output
from optimum_sab.hf.output.saving import written_whole
from optimum_sab.json_values import json_line


def run(options: argparse.Namespace) -> None:
    """Copy it.

    Raises:
        OutputExistsError: the folder is not empty.
        OutputError: it cannot be written to.
    """
    with written_whole(check_output(options.output, options.overwrite)) as folder:
        shutil.copytree(checkpoint_path(), folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    size = sum(file.stat().st_size for file in options.output.iterdir())
    if options.json:
        print(json_line({"output": str(options.output), "bytes": size}))
    elif not options.quiet:
        print(f"{options.output}: a trained Qwen2.5-VL, {size / 1e6:.1f} MB; optimum-sab quantize can take it.")
