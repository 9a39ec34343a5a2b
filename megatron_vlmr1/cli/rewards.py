"""``vlmr1 rewards``: score jsonl from stdin to stdout; serve rewards in the foreground."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vlmr1 import errors
from megatron_vlmr1.cli.common import print_json

if TYPE_CHECKING:
    from megatron_vlmr1.config import RewardsConfig
    from megatron_vlmr1.rewards.client import RewardClient
    from megatron_vlmr1.rewards.item import RewardItem

_READ_BYTES = 1 << 20
_START_S = 60.0  # for processes that have to be started again meanwhile
_TRIES = 3  # the two that an item has, and some air
_MAX_LINE_BYTES = 16 << 20
_SCORE_EXAMPLE = """\
one object a line, in: {"reward", "completion", "solution"}, and where they matter "image_size": [w, h],
"grid_thw": [t, h, w], "compat": "vlm-r1"; out: {"value", "parts", "failure"}, in the same order. A bad line gives a
line with its failure and its number, and the stream goes on.

example:
  echo '{"reward": "iou", "completion": "<answer>[0, 0, 9, 9]</answer>", "solution": "[0, 0, 9, 9]"}' \\
    | vlmr1 rewards score
"""


@dataclass(frozen=True)
class _Line:
    """One line of stdin: a reward and an item, or a problem."""

    reward: str = ""
    item: RewardItem | None = None
    problem: str = ""


def add_parser(subparsers: Any) -> None:
    """Add the verb and its two commands to the program's parser."""
    parser = subparsers.add_parser(
        "rewards",
        help="score completions, or serve rewards",
        description="Rule-based rewards, computed in processes with a deadline and a memory limit.",
        epilog="example: vlmr1 rewards score < lines.jsonl > scores.jsonl",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    score = commands.add_parser(
        "score", help="jsonl on stdin to jsonl on stdout", description="Scores lines.", epilog=_SCORE_EXAMPLE
    )
    score.set_defaults(run=run_score)
    serve = commands.add_parser(
        "serve",
        help="run the reward service in the foreground",
        description="Serves until it is interrupted: on a socket of this machine whoever may open it, on the network "
        "the owners of the keys in FOLDER/clients. A trainer uses it with rewards.address and rewards.keys.",
        epilog="example: vlmr1 rewards serve --bind tcp://0.0.0.0:5555 --keys rewards-keys --workers 32",
    )
    serve.add_argument("--bind", metavar="ADDRESS", required=True, help="ipc://PATH, or tcp://ADDRESS:PORT with --keys")
    serve.add_argument("--keys", type=Path, metavar="FOLDER", help="made by `vlmr1 rewards keys`")
    serve.set_defaults(run=run_serve)
    keys = commands.add_parser(
        "keys",
        help="make keys for a service on another node",
        description="Makes a folder of CURVE keys for a reward service and those who may ask it.",
        epilog="example: vlmr1 rewards keys rewards-keys",
    )
    keys.add_argument("folder", type=Path, help="new folder")
    keys.set_defaults(run=run_keys)
    listed = commands.add_parser("list", help="what rewards there are", epilog="example: vlmr1 rewards list")
    listed.add_argument("--json", action="store_true", help="one JSON object: what each reward says of itself")
    listed.set_defaults(run=run_list)
    for command in (score, serve):
        command.add_argument("--workers", type=int, help="reward processes")
        command.add_argument("--deadline-s", type=float, metavar="S", help="seconds an item may take")
        command.add_argument("--memory-bytes", type=int, metavar="N", help="address space of a reward process")
        command.add_argument(
            "--functions",
            action="append",
            type=Path,
            default=[],
            metavar="FILE.py",
            help="rewards of your own: each function f(item) -> float of this file, by its name; may be repeated",
        )


def run_score(args: argparse.Namespace) -> int:
    """Score every line of stdin.

    Raises:
        ValueError: a setting is wrong or a file is missing.
    """
    from megatron_vlmr1.rewards.client import RewardClient
    from megatron_vlmr1.rewards.service import RewardService

    config = _config(args)
    limit_s = _TRIES * config.deadline_s
    with tempfile.TemporaryDirectory(prefix="vlmr1-") as log_dir:
        with RewardService(config, Path(log_dir), args.functions) as service, RewardClient(service.address) as client:
            number = 1
            for lines in _available_lines():
                _score_lines(client, number, [_parse(line, bool(args.functions)) for line in lines], limit_s)
                number += len(lines)
    return errors.DONE


def run_serve(args: argparse.Namespace) -> int:
    """Become the service.

    Raises:
        ValueError: a setting is wrong or a file is missing.
    """
    from megatron_vlmr1.rewards import server
    from megatron_vlmr1.rewards.pool import PoolSettings

    config = _config(args)
    if not args.bind.startswith(("ipc://", "tcp://")):
        raise ValueError(f"--bind {args.bind}: expected ipc://PATH or tcp://ADDRESS:PORT")
    files = tuple(os.path.abspath(path) for path in args.functions)
    settings = PoolSettings(config.workers, config.deadline_s, config.memory_bytes, files)
    command = server.command(args.bind, settings, args.keys)
    # Reward processes import the main module of the process that starts them: the slim server, not this program.
    os.execve(command[0], command, server.environment())  # noqa: S606 - our own module, no shell


def run_keys(args: argparse.Namespace) -> int:
    """Make keys.

    Raises:
        ValueError: the folder exists.
    """
    from megatron_vlmr1.rewards import keys

    keys.create(args.folder)
    print(args.folder)
    return errors.DONE


def run_list(args: argparse.Namespace) -> int:
    """Print every reward."""
    from megatron_vlmr1.rewards import functions

    said = {name: functions.about(name) for name in functions.names()}
    if args.json:
        print_json(said)
        return errors.DONE
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("reward", "what it says")
    for name, words in said.items():
        table.add_row(name, escape(words))
    Console().print(table)
    return errors.DONE


def _config(args: argparse.Namespace) -> RewardsConfig:
    from pydantic import ValidationError

    from megatron_vlmr1.config import RewardsConfig

    given = {name: getattr(args, name) for name in ("workers", "deadline_s", "memory_bytes")}
    try:
        return RewardsConfig.model_validate({name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"--{str(first['loc'][0]).replace('_', '-')}: {first['msg']}") from error


def _available_lines() -> Iterator[list[bytes]]:
    """Yield the lines of stdin as they come, so that a caller may wait for each answer.

    Of a line beyond the limit only the beginning is kept, a little more than the limit.
    """
    rest = b""
    while chunk := os.read(sys.stdin.fileno(), _READ_BYTES):
        first, newline, more = chunk.partition(b"\n")
        if len(rest) <= _MAX_LINE_BYTES:
            rest += first
        if newline:
            *lines, last = more.split(b"\n")
            yield [rest, *lines]
            rest = last
    if rest:
        yield [rest]


def _score_lines(client: RewardClient, first: int, lines: list[_Line], limit_s: float) -> None:
    """Print one result a line; line `first` is the first of `lines`, and each may take `limit_s`."""
    asked = []
    for number, line in enumerate(lines, first):
        if line.item is not None:
            client.submit(number, line.item, {line.reward: 1.0})
            asked.append(number)
    scores = client.collect(asked, _START_S + limit_s * len(asked))
    for number, line in enumerate(lines, first):
        if line.item is None:
            failure = f"line {number}: {line.problem}"
            print_json({"value": None, "parts": {}, "failure": failure, "line": number})
        else:
            score = scores[number]
            print_json({"value": score.value, "parts": score.parts, "failure": score.failure})


def _parse(line: bytes, own_functions: bool) -> _Line:
    from megatron_vlmr1.rewards import functions
    from megatron_vlmr1.rewards.item import RewardItem

    try:
        if len(line) > _MAX_LINE_BYTES:
            raise ValueError(f"too_long: more than {_MAX_LINE_BYTES} bytes")
        raw = _decode(line)
        name = raw.pop("reward", None)
        if not isinstance(name, str):
            raise ValueError("reward must be the name of a reward")
        if not own_functions:
            functions.get(name)  # else a reward process finds out, as only those run the user's files
        return _Line(name, RewardItem.parse(raw))
    except ValueError as error:
        return _Line(problem=str(error))


def _decode(line: bytes) -> dict[str, Any]:
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not json: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError("not a json object")
    return raw
