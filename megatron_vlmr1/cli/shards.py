"""``vlmr1 shards``: build, verify and inspect directories of indexed WebDataset shards."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_vlmr1 import errors
from megatron_vlmr1.cli import sets
from megatron_vlmr1.cli.common import byte_size, print_json, size_text

_BUILD_EXAMPLE = """\
examples:
  vlmr1 shards build shards/rec --jsonl rec.jsonl --images coco/train2014
  vlmr1 shards build shards/mix --jsonl a.jsonl --images a/ --jsonl b.jsonl --images b/ --shard-size 256MB
  vlmr1 shards build shards/web --jsonl web.jsonl --images web/ --max-rejected 0.01
"""


def add_parser(subparsers: Any) -> None:
    """Add the verb and its three commands to the program's parser."""
    parser = subparsers.add_parser(
        "shards",
        help="build, verify and inspect data shards",
        description="WebDataset tar shards with an index beside each.",
        epilog="example: vlmr1 shards build shards/rec --jsonl rec.jsonl --images coco/train2014",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_build(commands)
    verify = commands.add_parser(
        "verify",
        help="read every sample and name the damaged ones",
        description="Checks every sample against its checksum. Exit code 1 when anything is damaged.",
        epilog="example: vlmr1 shards verify shards/rec --json",
    )
    inspect = commands.add_parser(
        "inspect",
        help="counts, sizes and resolutions",
        description="Reads every sample and the header of every image.",
        epilog="example: vlmr1 shards inspect shards/rec",
    )
    for command, what in ((verify, run_verify), (inspect, run_inspect)):
        command.add_argument("directory", metavar="DIR", help="directory of shards")
        command.add_argument("--json", action="store_true", help="print one JSON document")
        command.set_defaults(run=what)
    sets.add_scenes(commands)
    sets.add_easy_vqa(commands)


def run_build(args: argparse.Namespace) -> int:
    """Build shards and print what was built.

    Raises:
        ValueError: as `megatron_vlmr1.data.shards.build`.
    """
    from megatron_vlmr1.data.shards import REJECTED, build

    roots = args.images or [Path(path).parent for path in args.jsonl]
    if len(roots) == 1:
        roots = roots * len(args.jsonl)
    with _progress("building shards") as progress:
        done = build(args.jsonl, roots, args.out, args.shard_size, args.max_rejected, progress)
    if args.json:
        print_json(done)
    else:
        print(
            f"{done['out']}: {done['samples']} samples with {done['images']} images, {size_text(done['bytes'])}", end=""
        )
        print(f" in {done['shards']} shards", end="")
        print(f"; {done['rejected']} rows left out, see {REJECTED}" if done["rejected"] else "")
    return errors.DONE


def run_verify(args: argparse.Namespace) -> int:
    """Verify shards; 1 when anything is damaged.

    Raises:
        ValueError: DIR holds no indexed shards.
    """
    from megatron_vlmr1.data.index import verify

    with _progress("verifying shards") as progress:
        found = verify(args.directory, progress)
    if args.json:
        print_json(found)
    else:
        for row in found["damaged"]:
            print(f"{row['shard']} {row['key']}: {row['reason']}")
        print(f"{found['indexed']} indexed, {found['delivered']} delivered, {len(found['damaged'])} damaged")
    return errors.DIFFERS if found["damaged"] else errors.DONE


def run_inspect(args: argparse.Namespace) -> int:
    """Print what the shards hold.

    Raises:
        ValueError: DIR holds no indexed shards.
    """
    from megatron_vlmr1.data.inspect import inspect

    with _progress("inspecting shards") as progress:
        found = inspect(args.directory, progress)
    if args.json:
        print_json(found)
        return errors.DONE
    print(f"{args.directory}: {found['samples']} samples with {found['images']} images", end="")
    print(f" in {found['shards']} shards, {size_text(found['bytes'])}; {found['damaged']} samples damaged")
    for title in ("images_per_sample", "formats"):
        counts = ", ".join(f"{value}: {count}" for value, count in found[title].items())
        print(f"{title.replace('_', ' ')}: {counts or 'none'}")
    if found["pixels"]:
        print("pixels of an image: " + ", ".join(f"{name} {value}" for name, value in found["pixels"].items()))
        _print_bins(found["longer_side"])
    return errors.DONE


def _add_build(commands: Any) -> None:
    build = commands.add_parser(
        "build",
        help="VLM-R1 jsonl and images to shards",
        description="Packs rows and their images into tar shards, each with an index. A bad row is an error, unless"
        " --max-rejected allows for it; then it goes to rejected.jsonl.",
        epilog=_BUILD_EXAMPLE,
    )
    build.add_argument("out", metavar="OUT", help="directory to create; must not exist")
    build.add_argument("--jsonl", metavar="F.jsonl", action="append", required=True, help="rows; may be repeated")
    build.add_argument(
        "--images",
        metavar="DIR",
        action="append",
        help="folder that image paths start from: one for each --jsonl, or one for all (default: where the jsonl is)",
    )
    build.add_argument("--shard-size", metavar="SIZE", type=byte_size, default="64MB", help="default: 64MB")
    build.add_argument(
        "--max-rejected",
        metavar="FRACTION",
        type=_fraction,
        default=0.0,
        help="share of bad rows to leave out (default: 0)",
    )
    build.add_argument("--json", action="store_true", help="print one JSON document")
    build.set_defaults(run=run_build)


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on stderr where that is a terminal, else one line."""
    if not sys.stderr.isatty():
        print(f"{what} ...", file=sys.stderr, flush=True)
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print_bins(bins: list[dict[str, Any]]) -> None:
    print("longer side in pixels:")
    most = max(row["images"] for row in bins)
    for row in bins:
        label = "larger" if row["upto"] is None else f"<= {row['upto']}"
        print(f"  {label:>8} {row['images']:>9} {'#' * round(40 * row['images'] / most)}")


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a fraction between 0 and 1")
    return value
