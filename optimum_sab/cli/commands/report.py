"""`optimum-sab report DIR`."""

from __future__ import annotations

import argparse
import webbrowser

from optimum_sab.json_values import json_line
from optimum_sab.report.files import read_report, write_page


def run(options: argparse.Namespace) -> None:
    """Make the page, and say where it is and what the verdict was.

    Raises:
        ReportError, MissingDependencyError, OutputError: see `write_page`.
    """
    page = write_page(options.folder)
    verdict = read_report(options.folder)["verdict"]
    opened = options.open and webbrowser.open(page.resolve().as_uri())
    if options.json:
        print(json_line({"report": str(page), "verdict": verdict, **({"opened": opened} if options.open else {})}))
        return
    if not options.quiet:
        print(f"{page}: {verdict['words']}")
    if options.open and not opened:
        print("no browser was found to show it in; open the file yourself.")
