"""`optimum-sab quantize MODEL --output DIR`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optimum_sab.cli.arguments.common import add_common
from optimum_sab.cli.arguments.settings import add_settings, add_source

DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_command(commands: Any, arguments: Sequence[str] = ()) -> None:
    """Add the command's parser."""
    parser = commands.add_parser("quantize", help="binarize a checkpoint and save it packed")
    parser.add_argument("model", help="checkpoint folder or Hub repository")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="where the packed checkpoint goes")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint in the output; other files stay")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="dtype of everything that stays dense")
    parser.add_argument("--device-map", metavar="MAP", help="as in from_pretrained: cpu, auto, cuda:0")
    parser.add_argument("--processor", metavar="PATH", help="processor to use instead of the checkpoint's own")
    add_source(parser)
    add_settings(parser, arguments)
    add_common(parser)
    parser.set_defaults(run="quantize.run")
