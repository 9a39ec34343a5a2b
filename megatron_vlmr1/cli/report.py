"""``vlmr1 report``: one self-contained page about a run."""

from __future__ import annotations

import argparse
from typing import Any

from megatron_vlmr1 import errors
from megatron_vlmr1.cli.common import print_json


def add_parser(subparsers: Any) -> None:
    """Add the verb to the program's parser."""
    parser = subparsers.add_parser(
        "report",
        help="build a run's report.html",
        description="Writes RUN_DIR/report.html, one page that loads nothing: curves, phase times, the figures before"
        " and after, pictures with boxes, completions. Shows what the run has so far, also while it is still training.",
        epilog="example: vlmr1 report runs/quickstart",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="a config's run_dir")
    parser.add_argument("--json", action="store_true", help='print {"report": PATH} instead of the path')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Build the page and print its path.

    Raises:
        ValueError: RUN_DIR is no run, or one of its files is damaged.
    """
    from megatron_vlmr1.report.page import build

    path = str(build(args.run_dir))
    if args.json:
        print_json({"report": path})
    else:
        print(path)
    return errors.DONE
