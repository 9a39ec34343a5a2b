"""What runs inside a reward process. Imports no torch, no numpy and no socket library, so that it starts fast."""

from __future__ import annotations

import math
import numbers
import os
import resource
import signal

from megatron_vlmr1.rewards import functions, wire
from megatron_vlmr1.rewards.item import RewardFailure, RewardItem
from megatron_vlmr1.runtime.children import die_with_parent

_files: tuple[str, ...] = ()


def start(parent_pid: int, memory_bytes: int, files: tuple[str, ...]) -> None:
    """Prepare a fresh reward process: bound to its parent, limited in memory, stdout sent where stderr goes."""
    global _files
    die_with_parent(parent_pid)
    # At once, instead of a handler that waits for a function that holds the interpreter.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    _files = files


def ready() -> bytes:
    """Return this process's id: the first task of each process, which shows that it has started."""
    return wire.pack(os.getpid())


def score(data: bytes) -> bytes:
    """Score a msgpack list of items; return a msgpack list of results."""
    return wire.pack([score_item(item) for item in wire.unpack(data)])


def score_item(data: bytes) -> bytes:
    """Score one item: msgpack ``[names, item]`` to a packed `Result`. Never raises, whatever a function does."""
    name = "item"
    parts: dict[str, float] = {}
    try:
        names, raw = wire.unpack(data)
        item = RewardItem.parse(raw)
        for name in names:
            parts[name] = _number(functions.get(name, _files)(item))
        return wire.Result(parts=parts).to_wire()
    except RewardFailure as error:
        reason = str(error)
    except MemoryError:
        reason = "out of memory"
    except BaseException as error:  # a function may even raise SystemExit; nothing of it is to be pickled
        reason = f"{type(error).__name__}: {error}"
    return wire.Result(failure=f"{name}: {reason}").to_wire()


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise RewardFailure(f"returned {type(value).__name__}, not a number")
    if not math.isfinite(value):
        raise RewardFailure(f"returned {float(value)}")
    return float(value)
