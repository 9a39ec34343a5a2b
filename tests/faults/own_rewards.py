"""Reward functions that misbehave on request; the reward processes of the fault tests load them from here by path."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from megatron_vlmr1.rewards.item import RewardItem


def echo(item: RewardItem) -> float:
    """The completion as a number."""
    return float(item.completion)


def announce(item: RewardItem) -> float:
    """Write this process's id into a new file beside `solution`, then take a while."""
    path = Path(item.solution)
    path.with_name(f"{path.name}.{time.monotonic_ns()}").write_text(str(os.getpid()))
    time.sleep(float(item.completion))
    return 1.0


def hang(item: RewardItem) -> float:
    """Hold the interpreter for hours."""
    return float(9**9**9 > 0)


def stop(item: RewardItem) -> float:
    """Be stopped, as by SIGSTOP from outside."""
    os.kill(os.getpid(), signal.SIGSTOP)
    return 1.0


def die(item: RewardItem) -> float:
    """End the process."""
    os.kill(os.getpid(), signal.SIGKILL)
    return 1.0


def bomb(item: RewardItem) -> float:
    """Take all memory."""
    return float(len(b"x" * (64 << 30)))


def odd(item: RewardItem) -> object:
    """Return or raise what `completion` names."""
    print("printed to stdout")
    match item.completion:
        case "none":
            return None
        case "nan":
            return float("nan")
        case "text":
            return "1.0"
        case "huge":
            return 10**400
        case "true":
            return True
        case "exit":
            sys.exit(3)
        case "recursion":
            return odd(item) if item else 0.0
    raise KeyError("\ud800 surrogate")


def torch_free(item: RewardItem) -> float:
    """Whether this process has imported neither torch nor numpy."""
    return float("torch" not in sys.modules and "numpy" not in sys.modules)
