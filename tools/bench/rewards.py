"""Rewards through the service with one worker process, beside a loop that calls the function in this process.

Cases: `rec`, the overlap of one box; `odLength`, 20 answered boxes of 8 classes against 20 true ones. Both sides score
the same completions. The service's figure takes in packing, sockets, both processes and the check of what comes back.
Case `respawn`: seconds from the kill -9 of a worker until another is there, with items in hand, of which none may be
lost; beside the limit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_vlmr1.config import RewardsConfig
from megatron_vlmr1.rewards import functions
from megatron_vlmr1.rewards.client import RewardClient
from megatron_vlmr1.rewards.item import RewardItem
from megatron_vlmr1.rewards.service import RewardService
from tools.bench import common

CASES = {"rec": "iou", "odLength": "odLength"}
COUNTS = {"rec": 20_000, "odLength": 4_000}
BOXES, CLASSES = 20, 8
SIDE = 1000
JITTER = 6  # pixels
TIMEOUT_S = 300.0
RESPAWN = "respawn"
RESPAWN_LIMIT_S = 2.0
RESPAWN_ITEMS = 200


def main() -> None:
    """Measure the cases that were asked for."""
    args = arguments()
    names = common.chosen(args, [*CASES, RESPAWN])
    common.finish("rewards", [respawn(args) if name == RESPAWN else measure(name, args) for name in names], args)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options, the process's own by default."""
    parser = common.parser(__doc__, [*CASES, RESPAWN])
    parser.add_argument("--count", type=int, help=f"completions (default: {COUNTS})")
    return parser.parse_args(words)


def measure(name: str, args: argparse.Namespace) -> common.Case:
    """Return a case's figures, in scores per second."""
    items = drawn(name, args.count or COUNTS[name])
    reward = CASES[name]
    function = functions.get(reward)
    expected = [function(item) for item in items]
    with (
        tempfile.TemporaryDirectory(prefix="bench-rewards-") as folder,
        RewardService(RewardsConfig(workers=1), Path(folder)) as service,
        RewardClient(service.address) as client,
    ):

        def ours() -> float:
            started = time.perf_counter()
            for number, item in enumerate(items):
                client.submit(number, item, {reward: 1.0})
                client.poll()
            scores = client.collect(range(len(items)), TIMEOUT_S)
            seconds = time.perf_counter() - started
            assert [score.value for score in scores.values()] == expected
            return len(items) / seconds

        def peer() -> float:
            started = time.perf_counter()
            for item in items:
                function(item)
            return len(items) / (time.perf_counter() - started)

        pairs = common.alternate(ours, peer, args.pairs)
        latency = client.stats()
    size = sum(len(item.completion) for item in items) // len(items)
    setting = (
        f"{len(items)} completions of {size} characters at once, one worker; "
        f"p50 {latency['latency_p50_s']:.2f} s, p99 {latency['latency_p99_s']:.2f} s in the service; peer: a loop"
    )
    return common.case(name, pairs, "scores/s", setting, more_is_better=True)


def respawn(args: argparse.Namespace) -> common.Case:
    """Return the seconds until a killed worker of two is replaced."""
    items = drawn("rec", RESPAWN_ITEMS)
    with (
        tempfile.TemporaryDirectory(prefix="bench-rewards-") as folder,
        RewardService(RewardsConfig(workers=2), Path(folder)) as service,
        RewardClient(service.address) as client,
    ):

        def workers() -> set[int]:
            return set(client.stats()["worker_pids"])

        def ours() -> float:
            while len(before := workers()) < 2:
                time.sleep(0.01)
            for number, item in enumerate(items):
                client.submit(number, item, {"iou": 1.0})
            killed = min(before)
            os.kill(killed, signal.SIGKILL)
            started = time.perf_counter()
            while len(workers() - {killed}) < 2:
                time.sleep(0.01)
            seconds = time.perf_counter() - started
            assert all(score.failure is None for score in client.collect(range(len(items)), TIMEOUT_S).values())
            return seconds

        pairs = common.alternate(ours, lambda: RESPAWN_LIMIT_S, args.pairs)
    setting = f"one of two workers killed with {len(items)} items in hand, none lost; peer: the limit"
    return common.case(RESPAWN, pairs, "s", setting, more_is_better=False)


def drawn(name: str, count: int) -> list[RewardItem]:
    """Return random items, always the same."""
    rng = random.Random(0)  # noqa: S311 - not for secrets
    grid = (1, SIDE // 14, SIDE // 14)
    items = []
    for _ in range(count):
        truth = [_box(rng) for _ in range(BOXES if name == "odLength" else 1)]
        answer = [{"bbox_2d": [x + rng.randint(0, JITTER) for x in box], "label": label} for box, label in truth]
        true = [{"bbox_2d": box, "label": label} for box, label in truth]
        told = answer[0] if name == "rec" else answer
        text = f"<think>{'some words ' * 30}</think><answer>```json\n{json.dumps(told)}\n```</answer>"
        solution = json.dumps(truth[0][0]) if name == "rec" else f"```json\n{json.dumps(true)}\n```"
        items.append(RewardItem(text, solution, (SIDE, SIDE), grid))
    return items


def _box(rng: random.Random) -> tuple[list[int], str]:
    x, y = rng.randrange(SIDE - 200), rng.randrange(SIDE - 200)
    return [x, y, x + rng.randint(40, 180), y + rng.randint(40, 180)], f"class {rng.randrange(CLASSES)}"


if __name__ == "__main__":
    main()
