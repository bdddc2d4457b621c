"""`optimum-sab report DIR`."""

from __future__ import annotations

import argparse
import json
import webbrowser
from pathlib import Path
from typing import Any

from optimum_sab.report.files import read_report, write_page


def add_command(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser("report", help="make report.html of a packed checkpoint anew from its report.json")
    parser.add_argument("folder", type=Path, metavar="DIR", help="packed checkpoint folder")
    parser.add_argument("--open", action="store_true", help="show the page in the browser")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Make the page, and say where it is and what the verdict was.

    Raises:
        ReportError, MissingDependencyError, OutputError: see `write_page`.
    """
    page = write_page(options.folder)
    verdict = read_report(options.folder)["verdict"]
    opened = options.open and webbrowser.open(page.resolve().as_uri())
    if options.json:
        print(json.dumps({"report": str(page), "verdict": verdict, **({"opened": opened} if options.open else {})}))
        return
    print(f"{page}: {verdict['words']}")
    if options.open and not opened:
        print("no browser was found to show it in; open the file yourself.")
