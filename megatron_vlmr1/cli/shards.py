"""``vlmr1 shards``: build, verify and inspect directories of indexed WebDataset shards."""

from __future__ import annotations

import argparse
from typing import Any

from megatron_vlmr1 import errors
from megatron_vlmr1.cli import sets, shards_build
from megatron_vlmr1.cli.common import print_json, size_text, slow_progress

_REPAIR_TEXT = (
    "Samples are KEY.json with KEY.jpg or KEY.0.jpg, KEY.1.png ... (jpg, jpeg, png, webp). The json has question or"
    " problem and answer or solution, or VLM-R1's conversations. Other members, links and names with .. or from / are"
    " left alone and counted. Shards with a valid index are not touched."
)
_WIDTH = 40  # characters of the longest bar


def add_parser(subparsers: Any) -> None:
    """Add the verb and its commands to the program's parser."""
    parser = subparsers.add_parser(
        "shards",
        help="build, index, verify and inspect data shards",
        description="WebDataset tar shards with an index beside each.",
        epilog="example: vlmr1 shards build shards/rec --jsonl rec.jsonl --images coco/train2014",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    shards_build.add_parser(commands)
    _add_readers(commands)
    sets.add_scenes(commands)
    sets.add_easy_vqa(commands)


def _add_readers(commands: Any) -> None:
    index = commands.add_parser(
        "index",
        help="index WebDataset shards made elsewhere, in place",
        description=f"Writes an index beside each .tar that has none. {_REPAIR_TEXT} Exit code 1 when one is damaged.",
        epilog="example: vlmr1 shards index /data/webdataset",
    )
    verify = commands.add_parser(
        "verify",
        help="read every sample and name the damaged ones",
        description="Checks every sample against its checksum. Exit code 1 when anything is damaged.",
        epilog="example: vlmr1 shards verify shards/rec --json",
    )
    verify.add_argument(
        "--repair-index", action="store_true", help="first index the shards whose index is missing or damaged"
    )
    inspect = commands.add_parser(
        "inspect",
        help="counts, sizes, histograms, a contact sheet",
        description="Reads every sample and the header of every image.",
        epilog="example: vlmr1 shards inspect shards/rec --sheet sheet.png",
    )
    inspect.add_argument("--sheet", metavar="FILE.png", help="draw samples with the boxes of their solutions")
    inspect.add_argument("--count", metavar="N", type=int, default=36, help="samples on the sheet (default: 36)")
    for command, what in ((index, run_index), (verify, run_verify), (inspect, run_inspect)):
        command.add_argument("directory", metavar="DIR", help="directory of shards")
        command.add_argument("--json", action="store_true", help="print one JSON document")
        command.set_defaults(run=what)


def run_index(args: argparse.Namespace) -> int:
    """Index shards; 1 when samples may be lost.

    Raises:
        ValueError: as `megatron_vlmr1.data.repair.repair`.
    """
    from megatron_vlmr1.data.repair import lost, repair

    with slow_progress("indexing shards") as progress:
        changed = repair(args.directory, progress)
    if args.json:
        print_json({"indexed": changed})
    else:
        _print_changes(changed)
        print(f"{len(changed)} shards indexed, {sum(row['samples'] for row in changed)} samples in them")
    return errors.DIFFERS if any(map(lost, changed)) else errors.DONE


def run_verify(args: argparse.Namespace) -> int:
    """Verify shards; 1 when anything is damaged.

    Raises:
        ValueError: DIR holds no indexed shards.
    """
    from megatron_vlmr1.data.index import verify
    from megatron_vlmr1.data.repair import lost, repair

    changed = []
    if args.repair_index:
        with slow_progress("indexing shards") as progress:
            changed = repair(args.directory, progress)
    with slow_progress("verifying shards") as progress:
        found = verify(args.directory, progress)
    if args.json:
        print_json({**found, **({"repaired": changed} if args.repair_index else {})})
    else:
        _print_changes(changed)
        for row in found["damaged"]:
            print(f"{row['shard']} {row['key']}: {row['reason']}")
        print(f"{found['indexed']} indexed, {found['delivered']} delivered, {len(found['damaged'])} damaged")
    return errors.DIFFERS if found["damaged"] or any(map(lost, changed)) else errors.DONE


def run_inspect(args: argparse.Namespace) -> int:
    """Print what the shards hold, and draw the sheet.

    Raises:
        ValueError: DIR holds no indexed shards, or the sheet cannot be drawn.
    """
    from megatron_vlmr1.data.inspect import inspect

    if args.sheet:
        from pathlib import Path

        from megatron_vlmr1.data.sheet import contact_sheet
        from megatron_vlmr1.telemetry.files import write_atomic

        if not Path(args.sheet).name:
            raise ValueError(f"--sheet {args.sheet}: not the name of a file")
        write_atomic(Path(args.sheet), contact_sheet(args.directory, args.count))
    with slow_progress("inspecting shards") as progress:
        found = inspect(args.directory, progress)
    if args.json:
        print_json(found)
        return errors.DONE
    print(f"{args.directory}: {found['samples']} samples with {found['images']} images", end="")
    print(f" in {found['shards']} shards, {size_text(found['bytes'])}; {found['damaged']} samples damaged")
    for title in ("formats", "methods"):
        counts = ", ".join(f"{value}: {count}" for value, count in found[title].items())
        print(f"{title}: {counts or 'none'}")
    if found["pixels"]:
        print("pixels of an image: " + ", ".join(f"{name} {value}" for name, value in found["pixels"].items()))
    _print_bars("images per sample", found["images_per_sample"])
    for key, title in (
        ("longer_side", "longer side in pixels"),
        ("area", "pixels"),
        ("question_chars", "characters of a question"),
        ("solution_chars", "characters of a solution"),
    ):
        bars = {("more" if row["upto"] is None else f"<= {row['upto']}"): [*row.values()][1] for row in found[key]}
        _print_bars(title, bars)
    return errors.DONE


def _print_bars(title: str, bars: dict[str, int]) -> None:
    """Print a histogram, without the empty bins at its ends."""
    if not any(bars.values()):
        return
    print(f"{title}:")
    shown = [place for place, count in enumerate(bars.values()) if count]
    for label, count in list(bars.items())[shown[0] : shown[-1] + 1]:
        print(f"  {label:>10} {count:>9} {'#' * -(-_WIDTH * count // max(bars.values()))}")


def _print_changes(changed: list[dict[str, Any]]) -> None:
    for row in changed:
        parts = [f"{row['shard']}: {row['why']}; indexed {row['samples']} samples"]
        if row["expected"] not in (None, row["samples"]):
            parts.append(f"it was built with {row['expected']}")
        parts += [
            f"{row[key]} {text}"
            for key, text in (("ignored", "members ignored"), ("without_json", "keys without a json left out"))
            if row[key]
        ]
        parts += [f"bytes {begin} to {end} can't be read" for begin, end in row["gaps"]]
        print(", ".join(parts))
