"""Supervised reward processes: a hard deadline per item, a memory limit, respawn, one retry.

Each process has a pebble pool of its own. A pebble pool of several workers breaks for good when an idle one is killed
("All workers expired"), and its workers share one pipe lock that a dead or stopped one can keep. With a pool per
process whatever goes wrong costs that process only: its pool is retired and a new one takes its place.
Only msgpack bytes go through pebble's pipe, and what comes back is validated.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field

from pebble import ProcessExpired, ProcessPool

from megatron_vlmr1.rewards import functions, wire, worker
from megatron_vlmr1.rewards.wire import Result

_BATCH_S = 0.02  # items are handed over in batches that take about this long, a batch ahead
_MAX_BATCH = 32
_STUCK_S = 5.0  # a process that answers nothing for this long beyond the deadline is not running at all
_START_S = 60.0  # time a process has to start
_MAX_START_FAILURES = 5
_TRIES = 2
_LEAST_MEMORY_BYTES = 256 << 20
_LATENCIES = 10_000

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PoolSettings:
    """How reward processes are run."""

    workers: int
    deadline_s: float  # of one item
    memory_bytes: int  # address space of one process
    files: tuple[str, ...] = ()  # the user's Python files with rewards

    def __post_init__(self) -> None:
        if self.workers < 1 or not self.deadline_s > 0:
            raise ValueError("rewards: workers and deadline_s must be positive")
        if self.memory_bytes < _LEAST_MEMORY_BYTES:
            raise ValueError(f"rewards: memory_bytes must be at least {_LEAST_MEMORY_BYTES}: Python itself needs that")
        for path in self.files:
            if not functions.source(path).is_file():
                raise ValueError(f"rewards: {path}: no such file of reward functions")


@dataclass
class _Job:
    ticket: Hashable
    data: bytes
    arrived: float
    tries: int = 0


@dataclass
class _Totals:
    scored: int = 0
    retried: int = 0
    respawned: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=_LATENCIES))


class _Lane:
    """One reward process and the batches it was given.

    A batch has the deadline of one item: batches are far shorter than that, and what stood in one that failed is tried
    again alone.
    """

    def __init__(self, settings: PoolSettings, done: Callable[[_Lane, Future[bytes]], None]) -> None:
        self.batches: dict[Future[bytes], list[_Job]] = {}
        self.item_s = _BATCH_S  # what an item takes, guessed from the last ones
        self.pid: int | None = None  # None until it has started
        self.moved = time.monotonic()  # last sign of life
        self.retired = False
        self.deadline_s = settings.deadline_s
        self._done = done
        self._pool = ProcessPool(
            1,
            initializer=worker.start,
            initargs=(os.getpid(), settings.memory_bytes, settings.files),
            context=multiprocessing.get_context("spawn"),
        )
        self._leaving = threading.Thread(target=self._pool.join, daemon=True)
        self.started: Future[bytes] = self._pool.schedule(worker.ready, timeout=_START_S)
        self.started.add_done_callback(lambda future: done(self, future))

    def give(self, jobs: list[_Job]) -> None:
        """Hand over one batch.

        Raises:
            RuntimeError: the pool is broken.
        """
        data = wire.pack([job.data for job in jobs])
        future = self._pool.schedule(worker.score, args=[data], timeout=self.deadline_s)
        if not self.batches:
            self.moved = time.monotonic()
        self.batches[future] = jobs
        future.add_done_callback(lambda future: self._done(self, future))

    def take(self, future: Future[bytes]) -> list[_Job]:
        """Return the jobs of a batch that has ended, and learn from how long it took."""
        jobs, now = self.batches.pop(future), time.monotonic()
        self.item_s = max((now - self.moved) / len(jobs), 0.8 * self.item_s)
        self.moved = now
        return jobs

    @property
    def broken(self) -> str | None:
        """Why this lane has to be replaced, or None."""
        if self.retired or not self._pool.active:
            return "worker died"
        waited = time.monotonic() - self.moved
        if self.pid is None:
            return "worker did not start" if waited > _START_S else None
        return "worker stuck" if self.batches and waited > self.deadline_s + _STUCK_S else None

    def retire(self) -> None:
        """Stop the process, killing it if need be, without waiting for that."""
        if not self.retired:
            self.retired = True
            self._pool.stop()
            self._leaving.start()

    def close(self) -> None:
        """Wait until the process of a retired lane is gone."""
        self._leaving.join()


class RewardPool:
    """Reward processes behind a queue. `submit` and `drain` from one thread; neither blocks."""

    def __init__(self, settings: PoolSettings) -> None:
        self._settings = settings
        self._queue: deque[_Job] = deque()
        self._results: list[tuple[Hashable, Result]] = []
        self._finished: deque[tuple[_Lane, Future[bytes]]] = deque()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._start_failures = 0
        self._totals = _Totals()
        self._lanes = [self._new_lane() for _ in range(settings.workers)]

    def fileno(self) -> int:
        """Return a descriptor that is readable when `drain` has something to do."""
        return self._wake_read

    def submit(self, ticket: Hashable, data: bytes) -> None:
        """Queue one item, msgpack ``[names, item]``; its result comes out of `drain` under `ticket`."""
        self._queue.append(_Job(ticket, data, time.monotonic()))
        self._feed()

    def drain(self) -> list[tuple[Hashable, Result]]:
        """Return what has finished, and see to the processes. Call it at least twice a second.

        Raises:
            RuntimeError: reward processes don't start.
        """
        try:
            os.read(self._wake_read, 1 << 16)
        except BlockingIOError:
            pass
        while self._finished:
            self._settle(*self._finished.popleft())
        for lane in list(self._lanes):
            reason = lane.broken
            if reason is not None:
                self._replace(lane, reason)
        self._feed()
        results, self._results = self._results, []
        return results

    def stats(self) -> dict[str, object]:
        """Return process ids, counts, latency percentiles in seconds, and failures by reason."""
        totals, latencies = self._totals, sorted(self._totals.latencies_s)
        return {
            "worker_pids": [lane.pid for lane in self._lanes if lane.pid is not None],
            "queue_depth": len(self._queue) + sum(len(j) for lane in self._lanes for j in lane.batches.values()),
            "scored": totals.scored,
            "retried": totals.retried,
            "respawned": totals.respawned,
            "failures": dict(totals.failures),
            "latency_p50_s": latencies[len(latencies) // 2] if latencies else 0.0,
            "latency_p99_s": latencies[len(latencies) * 99 // 100] if latencies else 0.0,
        }

    def close(self) -> None:
        """Stop all processes."""
        for lane in self._lanes:
            lane.retire()
        for lane in self._lanes:
            lane.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _new_lane(self) -> _Lane:
        return _Lane(self._settings, self._notify)

    def _notify(self, lane: _Lane, future: Future[bytes]) -> None:
        """Called in a thread of pebble's."""
        self._finished.append((lane, future))
        try:
            os.write(self._wake_write, b"x")
        except BlockingIOError:
            pass  # the reader has plenty to wake up for

    def _feed(self) -> None:
        """Give each idle process a batch, then, if none is idle or starting, each one batch ahead."""
        for depth in (1, 2):
            for lane in list(self._lanes):
                if self._queue and lane.pid is not None and not lane.retired and len(lane.batches) < depth:
                    jobs = self._next_batch(lane.item_s)
                    try:
                        lane.give(jobs)
                    except RuntimeError:
                        self._queue.extendleft(reversed(jobs))
                        self._replace(lane, "worker died")
            if not all(lane.batches for lane in self._lanes):
                return

    def _next_batch(self, item_s: float) -> list[_Job]:
        """Take from the queue what fits a batch, and no more than a fair share; an item that failed goes alone."""
        share = -(-len(self._queue) // len(self._lanes))
        jobs = [self._queue.popleft()]
        while len(jobs) < min(share, _MAX_BATCH, _BATCH_S / item_s) and not (jobs[0].tries or self._queue[0].tries):
            jobs.append(self._queue.popleft())
        return jobs

    def _settle(self, lane: _Lane, future: Future[bytes]) -> None:
        if lane.retired:
            return  # its items are queued again
        if future is lane.started:
            self._settle_start(lane, future)
            return
        error = future.exception()
        if error is None:
            jobs = lane.take(future)
            for job, result in zip(jobs, wire.parse_results(future.result(), len(jobs)), strict=True):
                self._finish(job, result)
            return
        if isinstance(error, FutureTimeout):
            reason = f"deadline of {self._settings.deadline_s:g} s exceeded"
        elif isinstance(error, ProcessExpired):
            reason = f"worker died (exit code {error.exitcode})"
        else:
            # pebble can't tell which batch was being worked on: each of them may have been.
            self._replace(lane, "worker died")
            return
        failed = lane.batches.pop(future)
        self._queue.extendleft(job for jobs in lane.batches.values() for job in jobs)  # these had not begun
        lane.batches = {future: failed}
        self._replace(lane, reason)

    def _settle_start(self, lane: _Lane, future: Future[bytes]) -> None:
        if future.exception() is not None:
            self._replace(lane, f"worker did not start: {future.exception()}")
            return
        lane.pid = int(wire.unpack(future.result()))
        lane.moved = time.monotonic()
        self._start_failures = 0

    def _replace(self, lane: _Lane, reason: str) -> None:
        if not lane.retired:
            self._retire(lane, reason)
        try:
            self._lanes[self._lanes.index(lane)] = self._new_lane()
        except OSError as error:  # no more processes or descriptors for now: the next drain tries again
            logger.warning("no new reward process: %s", error)
            return
        self._totals.respawned += 1

    def _retire(self, lane: _Lane, reason: str) -> None:
        if lane.pid is None:
            self._start_failures += 1
            if self._start_failures >= _MAX_START_FAILURES:
                raise RuntimeError(f"reward processes don't start ({reason}); is memory_bytes large enough?")
        logger.warning("worker %s replaced: %s", lane.pid, reason)
        lane.retire()
        for jobs in lane.batches.values():
            self._fail_try(jobs, reason)
        lane.batches = {}

    def _fail_try(self, jobs: list[_Job], reason: str) -> None:
        """Queue the items of a failed batch once more, each alone; those that had their second try have failed."""
        for job in jobs:
            job.tries += 1
        again = [job for job in jobs if job.tries < _TRIES]
        lost = [job for job in jobs if job.tries >= _TRIES]
        logger.warning("%s: %d items tried once more, %d given up", reason, len(again), len(lost))
        self._totals.retried += len(again)
        self._queue.extendleft(again)
        for job in lost:
            self._finish(job, Result(failure=reason))

    def _finish(self, job: _Job, result: Result) -> None:
        self._totals.scored += 1
        self._totals.latencies_s.append(time.monotonic() - job.arrived)
        if result.failure is not None:
            known = result.failure in self._totals.failures or len(self._totals.failures) < 100
            self._totals.failures[result.failure if known else "other"] += 1
        self._results.append((job.ticket, result))
