"""A thread beside every rank's main thread that ends the job when it stands still, and says because of whom.

Every rank writes a heartbeat (`runtime/heartbeat.py`), looks whether its own main thread gets further, and whether
the next rank gives signs of life. If not for `limit_s`, a little less than the process group's timeout, the ranks
report (`runtime/hang_report.py`) and each ends its own process. No collective, no clock that ranks share, no launcher
of ours.

No phase is too long for it: what takes long within one says that it gets further (`telemetry.progress.mark`), and
nobody may wait in a collective for longer than the timeout anyway.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import IO

from megatron_vlmr1.errors import CRASHED
from megatron_vlmr1.runtime import hang_report, heartbeat, stacks
from megatron_vlmr1.runtime.hang import Stillness
from megatron_vlmr1.runtime.heartbeat import Heartbeat
from megatron_vlmr1.telemetry import progress

logger = logging.getLogger(__name__)

SAMPLE_S = 0.1  # how often the main thread is looked at


def limit_s(timeout_s: float) -> float:
    """Return after how many seconds without progress a rank hangs: before the process group's timeout kills it."""
    return timeout_s - max(min(1.0, timeout_s / 8), timeout_s / 20)


def beat_s(timeout_s: float) -> float:
    """Return the seconds between two heartbeats."""
    return min(max(timeout_s / 100, 0.5), 5.0)


class Watchdog:
    """Watches this rank and the next one for as long as it is open. Made and opened by the main thread."""

    def __init__(
        self, log_dir: Path, rank: int, world: int, timeout_s: float, leave: Callable[[int], object] = os._exit
    ) -> None:
        """`leave` ends this process with an exit code."""
        self.log_dir, self.rank, self.world = log_dir, rank, world
        self._limit_s, self._beat_s, self._leave = limit_s(timeout_s), beat_s(timeout_s), leave
        self._main = threading.get_ident()
        self._me = Heartbeat(rank, socket.gethostname(), os.getpid())
        self._own, self._next = Stillness(2 * self._beat_s), Stillness(2 * self._beat_s)
        self._next_last_seen: int | None = None  # our step when the next rank last gave a sign of life
        self._warned = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._dump = heartbeat.path(log_dir, rank).with_suffix(".stacks")

    def __enter__(self) -> Watchdog:
        """Start to watch."""
        progress.here.show = stacks.show
        self._beat(0.0)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Stop to watch; the last heartbeat says why."""
        self._ended.set()
        self._thread.join()
        progress.here.show = str
        words = "" if error is None else f"{type(error).__name__}: {error}"
        self._me = replace(self._me, left=True, error=words)
        self._beat(0.0)

    def _watch(self) -> None:
        looked = written = time.monotonic()
        with _dump_file(self._dump) as dump:
            while not self._ended.wait(SAMPLE_S):
                now, here = time.monotonic(), progress.here
                at, waits = stacks.place(sys._current_frames().get(self._main))
                if waits:
                    here.waits[here.phase] += min(now - looked, 2 * SAMPLE_S)
                looked = now
                if now - written < self._beat_s and here.step == self._me.step:
                    continue
                written = now
                if dump is not None:  # by a thread in C, so even if native code keeps Python from running
                    faulthandler.dump_traceback_later(self._limit_s, file=dump)
                self._me = replace(self._me, at=at, waits=waits)
                if self._hangs(now):
                    break
            faulthandler.cancel_dump_traceback_later()
        if not self._ended.is_set():
            try:
                hang_report.report(self.log_dir, self._me, self.world, self._beat_s, self._still_s())
            finally:  # whatever became of the report, where stderr or the disk is full
                self._leave(CRASHED)

    def _hangs(self, now: float) -> bool:
        """Write a heartbeat, and tell whether this rank or the next one hangs, or another has said that one does."""
        still_s = self._own.look((progress.here.phases, progress.here.marks), now)
        could_write = self._beat(still_s)
        # A file system that fails us tells nothing of the next rank.
        silent = could_write and self.world > 1 and self._next_is_silent(now)
        return still_s >= self._limit_s or silent or hang_report.is_begun(self.log_dir)

    def _next_is_silent(self, now: float) -> bool:
        step = progress.here.step
        seen = heartbeat.read(self.log_dir, (self.rank + 1) % self.world)
        still_s = self._next.look(seen.beat if seen else None, now)
        if still_s == 0:
            self._next_last_seen = step
        # Steps end only if all ranks take part: a rank that is silent meanwhile lives, and cannot write.
        lives = (step or 0) - (self._next_last_seen or 0) >= 2
        return still_s >= self._limit_s and not lives and not (seen is not None and seen.left)

    def _still_s(self) -> float:
        return max(self._own.seconds, self._next.seconds)

    def _beat(self, still_s: float) -> bool:
        """Write a heartbeat; return whether that worked."""
        here = progress.here
        self._me = replace(
            self._me,
            beat=self._me.beat + 1,
            step=here.step,
            resumed=here.resumed,
            phase=here.phase,
            phases=here.phases,
            phase_s=round(time.monotonic() - here.since, 1),
            asked=here.asked,
            still_s=round(still_s, 1),
        )
        try:
            heartbeat.write(self.log_dir, self._me)
        except OSError as error:
            if not self._warned:
                self._warned = True
                logger.warning("the heartbeat of rank %d cannot be written: %s", self.rank, error)
            return False
        return True


@contextmanager
def _dump_file(path: Path) -> Iterator[IO[str] | None]:
    """Open where stacks go that only C can write; None where there is no room for it."""
    try:
        file = path.open("w")
    except OSError:
        yield None
        return
    with file:
        yield file
