"""``vlmr1 shards build``."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vlmr1 import errors
from megatron_vlmr1.cli.common import byte_size, print_json, size_text, slow_progress

if TYPE_CHECKING:
    from megatron_vlmr1.data.building.sources import Source

_NO_METHOD = "none"
_DESCRIPTION = """\
Packs rows and their images into tar shards, each with an index. Sources may be repeated and mixed; their rows keep that
order. Bad rows are left out and named in rejected.jsonl; too many of them end the build before anything is copied.
An interrupted build goes on when the same command is given again.

--jsonl    VLM-R1 rows: image (a path, or a list of them, or none) and conversations of a human and a gpt turn
--coco     instances.json: one row an image, solution a json list of {"bbox_2d", "label"} in pixels, or None
--refcoco  a json list of {image, problem | normal_caption | expression | sentence | sentences, solution | bbox}; a box
           is [x1, y1, x2, y2], or [x, y, width, height] with "bbox_format": "xywh" in the entry or --box-format xywh;
           or one object with RefCOCO's tables images, annotations and refs
--parquet  a directory of Hugging Face parquet files: image or images, question or problem, answer or solution
"""
_EXAMPLE = """\
examples:
  vlmr1 shards build shards/rec --jsonl rec.jsonl --images coco/train2014
  vlmr1 shards build shards/mix --jsonl a.jsonl --images a/ --method iou --jsonl b.jsonl --images b/ --method mcq
  vlmr1 shards build shards/det --coco instances_val2017.json --images coco/val2017 --shard-size 256MB
"""


class _AddSource(argparse.Action):
    """Collects sources of all kinds in the order of the command line."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        namespace.sources = [*(namespace.sources or ()), (self.dest, Path(values))]


def add_parser(commands: Any) -> None:
    """Add the command to the parser of ``vlmr1 shards``."""
    build = commands.add_parser("build", help="rows and images to shards", description=_DESCRIPTION, epilog=_EXAMPLE)
    build.add_argument("out", metavar="OUT", help="directory to create; must not exist")
    for kind, metavar in (("jsonl", "F.jsonl"), ("coco", "F.json"), ("refcoco", "F.json"), ("parquet", "DIR")):
        build.add_argument(f"--{kind}", metavar=metavar, action=_AddSource, help="source of rows, see above")
    build.add_argument(
        "--images",
        metavar="DIR",
        action="append",
        help="folder that image paths start from: one for each source, or one for all (default: where the source is)",
    )
    build.add_argument(
        "--method",
        metavar="NAME",
        action="append",
        help=f"accu_reward_method of rows without one: one for each source (or {_NO_METHOD}), or one for all",
    )
    build.add_argument(
        "--question", metavar="TEXT", help="question with {classes} (--coco) or {expression} (--refcoco)"
    )
    build.add_argument(
        "--classes",
        choices=("all", "present"),
        default="all",
        help="--coco: ask for the classes of the file (default), or for those present in each image",
    )
    build.add_argument(
        "--box-format", choices=("xyxy", "xywh"), default="xyxy", help="--refcoco: of entries that don't say"
    )
    build.add_argument("--shard-size", metavar="SIZE", type=byte_size, default="64MB", help="default: 64MB")
    build.add_argument(
        "--max-rejected",
        metavar="FRACTION",
        type=_fraction,
        help="share of bad rows that may be left out (default: 0.01)",
    )
    build.add_argument(
        "--workers", metavar="N", type=_count, help="processes (default: up to one a CPU, as far as they pay)"
    )
    build.add_argument("--json", action="store_true", help="print one JSON document")
    build.set_defaults(run=run, sources=None)


def run(args: argparse.Namespace) -> int:
    """Build shards and print what was built.

    Raises:
        ValueError: as `megatron_vlmr1.data.shards.build_from`, or the options don't fit each other.
    """
    from megatron_vlmr1.data.shards import MAX_REJECTED_FRAC, REJECTED, build_from

    bars = functools.partial(slow_progress, text=size_text)
    most = MAX_REJECTED_FRAC if args.max_rejected is None else args.max_rejected
    done = build_from(_sources(args), args.out, args.shard_size, most, args.workers, bars)
    if args.json:
        print_json(done)
    else:
        print(f"{done['out']}: {done['samples']} samples with {done['images']} images", end="")
        print(f", {size_text(done['bytes'])} in {done['shards']} shards", end="")
        print(f"; {done['rejected']} rows left out, see {REJECTED}" if done["rejected"] else "")
    return errors.DONE


def _sources(args: argparse.Namespace) -> list[Source]:
    from megatron_vlmr1.data.building.sources import Source

    given: list[tuple[Any, Path]] = args.sources or []
    if not given:
        raise ValueError("no source of rows: give --jsonl, --coco, --refcoco or --parquet")
    kinds = {kind for kind, _ in given}
    _check_question(args.question, kinds)
    if args.classes != "all" and "coco" not in kinds:
        raise ValueError("--classes is about --coco, which is not given")
    if args.box_format != "xyxy" and "refcoco" not in kinds:
        raise ValueError("--box-format is about --refcoco, which is not given")
    roots = _one_for_each("--images", args.images, len(given))
    methods = _one_for_each("--method", args.method, len(given))
    return [
        Source(
            kind,
            path,
            Path(root) if root else path if kind == "parquet" else path.parent,
            None if method == _NO_METHOD else method,
            args.question,
            args.classes,
            args.box_format,
        )
        for (kind, path), root, method in zip(given, roots, methods, strict=True)
    ]


def _check_question(question: str | None, kinds: set[str]) -> None:
    if question is None:
        return
    places = {"coco": "{classes}", "refcoco": "{expression}"}
    if not kinds & places.keys():
        raise ValueError("--question is about --coco and --refcoco, and neither is given")
    for kind in sorted(kinds & places.keys()):
        if places[kind] not in question:
            raise ValueError(f"--question {question!r} must hold {places[kind]} for --{kind}")


def _one_for_each(option: str, values: list[str] | None, count: int) -> list[str | None]:
    if not values:
        return [None] * count
    if len(values) == 1:
        return [*values] * count
    if len(values) != count:
        raise ValueError(f"{len(values)} times {option} but {count} sources: give one for each, or one for all")
    return [*values]


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1024:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of processes from 1 to 1024")
    return int(text)


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a fraction between 0 and 1")
    return value
