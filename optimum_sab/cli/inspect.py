"""`optimum-sab inspect DIR`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from optimum_sab.hf.inventory import Inventory, read_inventory


def add_command(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser("inspect", help="show what a packed checkpoint holds: bits, bytes, settings")
    parser.add_argument("folder", type=Path, help="packed checkpoint folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print the inventory; only headers are read."""
    inventory = read_inventory(options.folder)
    if options.json:
        print(json.dumps(as_json(inventory)))
        return
    print(f"{'module':<56} {'shape':>14} {'bytes':>12} {'bits/weight':>12}")
    for module in inventory.modules:
        shape = f"{module.out_features}x{module.in_features}"
        print(f"{module.name:<56} {shape:>14} {module.bytes:>12,} {module.bits_per_weight:>12.3f}")
    print(
        f"\n{len(inventory.modules)} packed linears: {inventory.packed_bytes:,} bytes, "
        f"{inventory.bits_per_weight:.3f} bits per weight. Everything else: {inventory.dense_bytes:,} bytes.\n"
        f"format version {inventory.config.format_version}; settings other than the defaults:"
    )
    for name, value in inventory.config.to_diff_dict().items():
        if name not in ("quant_method", "format_version"):
            print(f"  {name}: {value}")


def as_json(inventory: Inventory) -> dict[str, Any]:
    """The inventory as one JSON-ready object."""
    return {
        "format_version": inventory.config.format_version,
        "bits_per_weight": inventory.bits_per_weight,
        "bytes_packed": inventory.packed_bytes,
        "bytes_dense": inventory.dense_bytes,
        "settings": inventory.config.to_dict(),
        "modules": [
            {
                "name": m.name,
                "out_features": m.out_features,
                "in_features": m.in_features,
                "bytes": m.bytes,
                "bits_per_weight": m.bits_per_weight,
            }
            for m in inventory.modules
        ],
    }
