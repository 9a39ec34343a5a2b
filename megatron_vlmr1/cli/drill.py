"""``vlmr1 drill``: the fault matrix, on this machine, as a table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vlmr1 import errors
from megatron_vlmr1.cli.common import print_json
from megatron_vlmr1.telemetry.files import write_atomic

if TYPE_CHECKING:
    from megatron_vlmr1.drill.matrix import Result

_EPILOG = """\
examples:
  vlmr1 drill --short
  vlmr1 drill --row kill-rollout --row disk-full --json
  vlmr1 drill --dir /shared/scratch/drill --write faults.md

Trains the shipped tiny model on up to 4 ranks of this machine, on its GPUs if it has any (else, or with
CUDA_VISIBLE_DEVICES="", over gloo), kills, stops and starves it, and compares what is left with a run that nobody
disturbed. --dir tries the file system that your runs will use. Exit code 1 when a figure is not met.
"""


def add_parser(subparsers: Any) -> None:
    """Add the verb to the program's parser."""
    parser = subparsers.add_parser("drill", help="run the fault matrix and print it as a table", epilog=_EPILOG)
    parser.add_argument("--row", action="append", default=[], metavar="NAME", help="only this row; may be repeated")
    parser.add_argument("--short", action="store_true", help="only the rows that take a minute together")
    parser.add_argument("--list", action="store_true", help="print the names of the rows and stop")
    parser.add_argument("--dir", type=Path, metavar="DIR", help="new directory for the runs (default: temporary)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="keep the table as markdown, with the commit")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the rows and print what was measured.

    Raises:
        ValueError: an unknown row, or a directory that is in use.
    """
    from megatron_vlmr1.drill import matrix

    rows = matrix.chosen(args.row, args.short)
    if args.list:
        for row in rows:
            print(f"{row.name}: {row.fault}")
        return errors.DONE
    results = matrix.run(rows, args.dir, _say)
    if args.write:
        write_atomic(args.write, matrix.markdown(results).encode())
    if args.json:
        print_json(matrix.document(results))
    else:
        _print_table(results)
    return errors.DONE if all(result.passed for result in results) else errors.DIFFERS


def _say(line: str) -> None:
    print(f"drill: {line}", file=sys.stderr, flush=True)


def _print_table(results: Sequence[Result]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("fault", "figure", "measured", "met", "s")
    for r in results:
        met = Text("yes", style="green") if r.passed else Text("no", style="bold red")
        table.add_row(Text(r.fault), Text(r.figure), Text(r.measured), met, f"{r.seconds:.0f}")
    Console().print(table)
