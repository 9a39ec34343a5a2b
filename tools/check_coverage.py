"""Every layout of the published models: whether it is legal, what its ranks hold, and how long it took to look.

Each rank's modules are built without memory, and every number of every Hugging Face tensor must lie on exactly one of
them. `python tools/check_coverage.py [3b 7b 32b 72b] [--json]`
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_vlmr1.checkpoint.coverage import cover
from megatron_vlmr1.config import ParallelConfig, parse_section
from megatron_vlmr1.models.families import read_shape

MODELS = Path(__file__).resolve().parents[1] / "configs" / "model"
SIZES = ("3b", "7b", "32b", "72b")
POWERS = (1, 2, 4, 8)
BF16_BYTES = 2


def main(words: Sequence[str] | None = None) -> None:
    """Look at all layouts and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sizes", nargs="*", metavar="SIZE", help=f"some of {SIZES} (default: all)")
    parser.add_argument("--json", action="store_true", help="one JSON object a layout")
    args = parser.parse_args(words)
    if unknown := set(args.sizes) - set(SIZES):
        parser.error(f"unknown size {min(unknown)}; known: {', '.join(SIZES)}")
    table = Table("model", "TP", "PP", "seconds", "GB of bf16 on each rank, or why not")
    for size in args.sizes or SIZES:
        seconds = 0.0
        for row in rows(size):
            seconds += row["seconds"]
            if args.json:
                print(json.dumps(row))
                continue
            held = row["error"] or f"{min(row['gb']):.2f} - {max(row['gb']):.2f}"
            table.add_row(size, str(row["tp"]), str(row["pp"]), f"{row['seconds']:.2f}", held)
        table.add_section()
        print(f"{size}: all layouts in {seconds:.1f} s", file=sys.stderr)
    if not args.json:
        Console(width=None if sys.stdout.isatty() else 160).print(table)


def rows(size: str) -> Iterator[dict[str, Any]]:
    """Yield each layout's sizes, time in seconds, and GB per rank or the reason why there is none."""
    shape = read_shape(MODELS / f"qwen2.5-vl-{size}")
    for tp, pp in ((tp, pp) for tp in POWERS for pp in POWERS):
        sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
        layout = parse_section(ParallelConfig, sizes, "layout")
        started = time.perf_counter()
        error, gb = None, []
        try:
            gb = [count * BF16_BYTES / 1e9 for count in cover(shape, layout).rank_parameters]
        except ValueError as problem:
            error = str(problem)
        yield {"model": size, "tp": tp, "pp": pp, "seconds": time.perf_counter() - started, "gb": gb, "error": error}


if __name__ == "__main__":
    main()
