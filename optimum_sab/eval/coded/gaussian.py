"""What codes are worth on a Gaussian source: `python -m optimum_sab.eval.coded.gaussian --codes 4 8 16 32 64`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from optimum_sab.core.code import find_code
from optimum_sab.eval.coded.search import Levels, search_bits

ROUNDS = 8


def gaussian_loss(name: str, free: int = 0, columns: int = 4096, seed: int = 0) -> tuple[float, list[float]]:
    """Share of a Gaussian's energy that is lost with ``1 + free`` stored bits, and the scales of the planes.

    Scales are fitted to what was found, and bits searched again, until both agree.

    Args:
        name: of the code.
        free: free planes beside the derived ones, of larger scale.
        columns: in each of 32 rows.
        seed: of the source.
    """
    code = find_code(name)
    source = torch.randn(32, columns, generator=torch.Generator().manual_seed(seed))
    largest = [2.0**-f for f in range(free)]
    scale = torch.tensor([(largest[-1] if free else 1.6) * 0.5 ** (q + 1) for q in range(len(code.taps))] + largest)
    loss = 1.0
    for _ in range(ROUNDS):
        row_scale = scale[:, None, None].expand(-1, 1, source.shape[0])
        ones = torch.ones(columns)
        levels = Levels(row_scale, ones, torch.zeros(columns), free * ones)
        bits = search_bits(source, torch.eye(columns), levels, code).bits
        planes = [*code.planes((bits & 1).bool()), *((bits >> (1 + f) & 1).float() * 2.0 - 1.0 for f in range(free))]
        basis = torch.stack([plane.flatten() for plane in planes], 1)
        scale = torch.linalg.lstsq(basis, source.flatten()[:, None]).solution[:, 0]
        loss = float((source.flatten() - basis @ scale).square().mean() / source.square().mean())
    return loss, scale.tolist()


def main(arguments: Sequence[str] | None = None) -> int:
    """A line for each code."""
    parser = argparse.ArgumentParser(prog="python -m optimum_sab.eval.coded.gaussian", description=__doc__)
    parser.add_argument("--codes", nargs="+", default=["4", "8", "16", "32", "64"], metavar="CODE")
    parser.add_argument("--free", type=int, default=0, metavar="N", help="free planes beside the coded one")
    parser.add_argument("--columns", type=int, default=1024, metavar="N", help="of 32 rows (default: 1024)")
    given = parser.parse_args(arguments)
    for name in given.codes:
        loss, scale = gaussian_loss(name, given.free, given.columns)
        parts = " ".join(f"{part:.3f}" for part in scale)
        sys.stdout.write(f"{name:>12}  loses {loss:.4f}  scales {parts}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
