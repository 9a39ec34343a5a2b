"""`vlmr1` with a rank that gets stuck: called as ``stuck.py RANK CALL HOW WORDS…``.

At its CALL-th rollout, counted from 0, rank RANK does as HOW says: ``loop`` in Python for ever, ``stop`` like one
that was sent SIGSTOP, ``native`` like a library that keeps the interpreter's lock for ever, ``kill`` like one that was
sent SIGKILL, or ``slow``: two seconds late at this and every later one. Other ranks are as always.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from typing import Any

from megatron_vlmr1.cli.common import configure_logging
from megatron_vlmr1.cli.main import main


def spin() -> None:
    """Never come back."""
    while True:
        sum(range(1000))


def native() -> None:
    """Sleep in C without letting go of the interpreter's lock."""
    ctypes.PyDLL(None).sleep(3600)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


ACTIONS = {
    "loop": spin,
    "native": native,
    "stop": lambda: send(signal.SIGSTOP),
    "kill": lambda: send(signal.SIGKILL),
    "slow": lambda: time.sleep(2),
}


def break_rollout(rank: str, call: int, how: str) -> None:
    configure_logging()  # before the slow imports, which warn
    from megatron_vlmr1.train import grpo

    original, calls = grpo.rollout, 0

    def rollout(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if os.environ["RANK"] == rank and (calls == call + 1 or (how == "slow" and calls > call)):
            ACTIONS[how]()
        return original(*args)

    grpo.rollout = rollout


if __name__ == "__main__":
    break_rollout(sys.argv[1], int(sys.argv[2]), sys.argv[3])
    sys.exit(main(sys.argv[4:]))
