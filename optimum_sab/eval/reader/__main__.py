"""Write the reader's checkpoint: `python -m optimum_sab.eval.reader --language DIR --output DIR`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError

from optimum_sab.errors import SABError
from optimum_sab.eval.reader.architecture import WEIGHTS, write_reader
from optimum_sab.failure import one_line


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0 if the checkpoint was written, 2 if it cannot be, with the reason on standard error."""
    parser = argparse.ArgumentParser(prog="python -m optimum_sab.eval.reader", description=__doc__)
    parser.add_argument("--language", type=Path, required=True, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--vision", type=Path, default=WEIGHTS, help="vision weights; default: the package's own")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in the output folder")
    given = parser.parse_args(arguments)
    try:
        written = write_reader(given.language, given.output, given.vision, given.overwrite)
    except (SABError, OSError, SafetensorError) as error:
        sys.stderr.write(f"{one_line(error)}\n")
        return 2
    sys.stdout.write(f"{written}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
