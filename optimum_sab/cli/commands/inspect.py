"""`optimum-sab inspect DIR`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from optimum_sab.cli.arguments.common import FoundWrong
from optimum_sab.cli.commands.settings import read_origin
from optimum_sab.hf.hub.fetch import checkpoint_folder
from optimum_sab.hf.inventory import Inventory, Verification, read_inventory, verify_inventory
from optimum_sab.json_values import json_line

SHOWN = 3  # rules that are named of those that set the same
_FORMS = {"kl": "{:.2f}", "top1": "{:.0%}"}


def run(options: argparse.Namespace) -> None:
    """Print the inventory; without ``--verify`` only headers are read.

    Raises:
        FoundWrong: after everything is printed, where a tensor is not what was saved.
    """
    inventory = read_inventory(checkpoint_folder(read_origin(options.folder, options)))
    verification = verify_inventory(inventory) if options.verify else None
    wrong = verification is not None and bool(verification.differ)
    if not options.json:
        _print_table(inventory)
        if verification is not None:
            print(f"\nverified: {verification.tensors - len(verification.differ)} of {verification.tensors} tensors")
            for name in verification.differ:
                print(f"  {name} is not what was saved")
    elif not wrong:
        print(json_line(as_json(inventory, verification)))
    if verification is not None and wrong:
        raise FoundWrong(
            f"{len(verification.differ)} of {verification.tensors} tensors in {str(options.folder)!r} are not what was "
            f"saved, {verification.differ[0]} the first; fetch the checkpoint again.",
            as_json(inventory, verification),
        )


def _print_table(inventory: Inventory) -> None:
    print(f"{'module':<56} {'shape':>14} {'bytes':>12} {'bits/weight':>12}")
    for module in inventory.modules:
        shape = f"{module.out_features}x{module.in_features}"
        print(f"{module.rule:<56} {shape:>14} {module.bytes:>12,} {module.bits_per_weight:>12.3f}")
    print(
        f"\n{len(inventory.modules)} packed linears: {inventory.packed_bytes:,} bytes, "
        f"{inventory.bits_per_weight:.3f} bits per weight. Everything else: {inventory.dense_bytes:,} bytes."
    )
    _print_measured(inventory.config.measured or {})
    print(f"format version {inventory.config.format_version}; settings other than the defaults:")
    for name, value in inventory.config.to_diff_dict().items():
        if name == "dynamic":
            print("\n".join(_rules(value)))
        elif name not in ("quant_method", "format_version", "measured"):
            print(f"  {name}: {value}")


def _print_measured(measured: Mapping[str, Any]) -> None:
    """How good the run found it to be."""
    for kind, each in measured.get("agreement", {}).items():
        kl, same = ("no number" if each[name] is None else form.format(each[name]) for name, form in _FORMS.items())
        print(f"against the dense model, on {kind}: KL {kl} nats per token, {same} the same")
    if "verdict" in measured:
        print(f"verdict: {measured['verdict']['words']}")


def _rules(dynamic: Mapping[str, Any]) -> Iterator[str]:
    """The rules of one kind together: an allocation by sensitivity leaves one for every linear, or group."""
    together: dict[str, list[str]] = {}
    for rule, changes in dynamic.items():
        together.setdefault(_change(changes), []).append(rule)
    yield f"  dynamic: {len(dynamic)} rules, what the allocation of bits chose among them"
    for change, rules in sorted(together.items(), key=lambda each: -len(each[1])):
        more = f" and {len(rules) - SHOWN} more" if len(rules) > SHOWN else ""
        yield f"    {change}: {', '.join(rules[:SHOWN])}{more}"


def _change(changes: Mapping[str, Any] | bool) -> str:
    if not isinstance(changes, Mapping):
        return "dense"
    without = changes.get("residual_planes") == 0  # then no column has one
    return ", ".join(f"{k} {v}" for k, v in changes.items() if not (without and k == "salient_fraction")) or "as set"


def as_json(inventory: Inventory, verification: Verification | None = None) -> dict[str, Any]:
    """The inventory as one JSON-ready object, with what was verified where something was."""
    checked = {} if verification is None else {"verified": asdict(verification)}
    return {
        **checked,
        "format_version": inventory.config.format_version,
        "bits_per_weight": inventory.bits_per_weight,
        "bytes_packed": inventory.packed_bytes,
        "bytes_dense": inventory.dense_bytes,
        "settings": inventory.config.to_dict(),
        "modules": [
            {
                "name": m.name,
                "rule": m.rule,
                "out_features": m.out_features,
                "in_features": m.in_features,
                "bytes": m.bytes,
                "bits_per_weight": m.bits_per_weight,
            }
            for m in inventory.modules
        ],
    }
