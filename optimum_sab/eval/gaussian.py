"""What codes are worth on a Gaussian source: `python -m optimum_sab.eval.gaussian --taps 19,4 25,23 --free 1`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from optimum_sab.core.code import MOST_MEMORY, Code
from optimum_sab.core.coded import coded_values
from optimum_sab.core.trellis import Levels
from optimum_sab.errors import ConfigError
from optimum_sab.ops.cpu.trellis import search_on_cpu

ROUNDS = 8
UNGERBOECK = ("5,2", "11,4", "19,4", "37,8", "67,20")  # his parity checks, 4 to 64 states


def read_code(taps: str) -> Code:
    """A code by its generators, as in ``19,4``, bit k of one being u[j − k].

    Raises:
        ConfigError: they are not one to three numbers in range.
    """
    parts = taps.split(",")
    if not 1 <= len(parts) <= 3 or not all(part.isdigit() for part in parts):
        raise ConfigError(f"taps {taps!r} must be one to three generators, as in '19,4'.")
    code = Code(taps, tuple(int(part) for part in parts))
    if min(code.taps) < 1 or code.memory > MOST_MEMORY:
        raise ConfigError(f"taps {taps!r}: generators must be 1 to {2 ** (MOST_MEMORY + 1) - 1}.")
    return code


def gaussian_loss(code: Code, free: int = 0, columns: int = 4096, seed: int = 0) -> float:
    """Share of a Gaussian's energy that is lost with ``1 + free`` stored bits.

    Scales are fitted to what was found, and bits searched again, until both agree. Beside free planes the coded one is
    begun with as the smallest and as the largest, and the better end counts.

    Args:
        code: of the coded plane.
        free: free planes beside it, of larger scale.
        columns: in each of 32 rows.
        seed: of the source.
    """
    source = torch.randn(32, columns, generator=torch.Generator().manual_seed(seed))
    largest = [2.0**-f for f in range(free)]
    begun = [[0.5 * largest[-1], *largest], [0.8, *(0.6 * scale for scale in largest)]] if free else [[0.8]]
    return min(_loss_from(torch.tensor(scale), code, free, source) for scale in begun)


def _loss_from(scale: Tensor, code: Code, free: int, source: Tensor) -> float:
    columns, loss = source.shape[1], 1.0
    blocks = torch.zeros(columns, dtype=torch.int64)
    for _ in range(ROUNDS):
        row_scale = scale[:, None, None].expand(-1, 1, source.shape[0])
        levels = Levels(row_scale, torch.ones(columns), blocks, blocks + free)
        bits = search_on_cpu(source, torch.eye(columns), levels, code)
        planes = [coded_values(code, (bits & 1).bool())]
        planes += [(bits >> (1 + f) & 1).float() * 2.0 - 1.0 for f in range(free)]
        basis = torch.stack([plane.flatten() for plane in planes], 1)
        scale = torch.linalg.lstsq(basis, source.flatten()[:, None]).solution[:, 0]
        loss = float((source.flatten() - basis @ scale).square().mean() / source.square().mean())
    return loss


def main(arguments: Sequence[str] | None = None) -> int:
    """A line for each code."""
    parser = argparse.ArgumentParser(prog="python -m optimum_sab.eval.gaussian", description=__doc__)
    parser.add_argument("--taps", nargs="+", default=list(UNGERBOECK), metavar="TAPS")
    parser.add_argument("--free", type=int, default=0, metavar="N", help="free planes beside the coded one")
    parser.add_argument("--columns", type=int, default=1024, metavar="N", help="of 32 rows (default: 1024)")
    given = parser.parse_args(arguments)
    for taps in given.taps:
        code = read_code(taps)
        sys.stdout.write(
            f"{taps:>12}  {1 << code.memory:>3} states  loses {gaussian_loss(code, given.free, given.columns):.4f}\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
