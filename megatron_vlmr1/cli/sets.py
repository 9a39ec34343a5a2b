"""``vlmr1 shards scenes`` and ``easy-vqa``: the built-in data sets, as rows and pictures that `shards build` reads."""

from __future__ import annotations

import argparse
from typing import Any

from megatron_vlmr1 import errors


def add_scenes(commands: Any) -> None:
    """Add the command that draws scenes."""
    scenes = commands.add_parser(
        "scenes",
        help="draw grounding or detection scenes: pictures and jsonl rows",
        description="Draws scenes of one split, the same for the same numbers, as rows that `shards build` reads.",
        epilog="examples:\n  vlmr1 shards scenes scenes --split heldout --count 320\n"
        "  vlmr1 shards scenes detection --task ovd --split train --count 6400",
    )
    scenes.add_argument("out", metavar="OUT", help="directory; gets SPLIT.jsonl and images/")
    scenes.add_argument(
        "--task",
        choices=("rec", "ovd"),
        default="rec",
        help="one object that a sentence describes (default), or all objects of some classes, which may be absent",
    )
    scenes.add_argument("--split", required=True, choices=("train", "heldout", "ood"))
    scenes.add_argument("--count", type=int, required=True, metavar="N", help="number of scenes")
    scenes.add_argument("--start", type=int, default=0, metavar="I", help="number of the first scene (default: 0)")
    scenes.add_argument(
        "--style",
        choices=("caption", "clean", "rough"),
        default="rough",
        help="SFT text of the rows: names and places only, with true boxes, or with loose ones (default)",
    )
    scenes.set_defaults(run=run_scenes)


def run_scenes(args: argparse.Namespace) -> int:
    """Draw scenes and print the jsonl's path.

    Raises:
        ValueError: as `megatron_vlmr1.data.scenes.write_split`.
    """
    from megatron_vlmr1.data import detection_scenes, scenes

    write_split = scenes.write_split if args.task == "rec" else detection_scenes.write_split
    print(write_split(args.out, args.split, args.count, args.start, args.style))
    return errors.DONE


def add_easy_vqa(commands: Any) -> None:
    """Add the command that unpacks easy-VQA."""
    easy_vqa = commands.add_parser(
        "easy-vqa",
        help="easy-VQA's questions: pictures and jsonl rows",
        description="Writes questions of the PyPI package easy-vqa (48,248 about 5,000 pictures, 13 answers, its own"
        " split) as rows that `shards build` reads.",
        epilog="example: vlmr1 shards easy-vqa rows --split test --count 640",
    )
    easy_vqa.add_argument("out", metavar="OUT", help="directory; gets SPLIT.jsonl and images/")
    easy_vqa.add_argument("--split", required=True, choices=("train", "test"))
    easy_vqa.add_argument(
        "--count", type=int, metavar="N", help="so many questions, spread evenly over the split (default: all)"
    )
    easy_vqa.set_defaults(run=run_easy_vqa)


def run_easy_vqa(args: argparse.Namespace) -> int:
    """Write the rows and print the jsonl's path.

    Raises:
        ValueError: as `megatron_vlmr1.data.easy_vqa.write_split`.
    """
    from megatron_vlmr1.data.easy_vqa import write_split

    print(write_split(args.out, args.split, args.count))
    return errors.DONE
