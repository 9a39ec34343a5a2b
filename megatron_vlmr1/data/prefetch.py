"""Worker processes that read, decode and build a rank's prompts ahead of it, in the order of the stream.

The rank sends each worker where the next samples lie, at most so many at a time that what comes back fits into the
bounds, and takes prompts in order. No thread: while the rank computes, workers do what they have been asked for. Which
worker does what changes nothing in what is delivered. A worker that dies or hangs is replaced and its samples are read
again; a sample on which workers died `_MAX_DEATHS` times is damage.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgpack  # type: ignore[import-untyped]

from megatron_vlmr1.data import handover
from megatron_vlmr1.data.handover import Item
from megatron_vlmr1.data.stream import Stream
from megatron_vlmr1.telemetry.progress import mark
from megatron_vlmr1.types import Damage

logger = logging.getLogger(__name__)

_MAX_DEATHS = 3
_START_S = 120.0  # a slow file system may take its time to bring Python and the tokenizer
_STOP_S = 2.0
# glibc would give a picture's memory back and fetch it again for the next one: a quarter of a worker's time
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}


@dataclass(frozen=True)
class Bounds:
    """How far ahead workers may be."""

    workers: int
    samples: int  # asked for or waiting
    bytes: int  # that these can take; a single sample may always be asked for
    sample_bytes: int  # that the patches of one can take
    timeout_s: float  # a worker that says nothing for so long hangs


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    channel: socket.socket
    jobs: deque[int] = field(default_factory=deque)  # positions it was asked for, in that order
    started: bool = False
    begun: int | None = None  # the position it works on; the one before may still be on its way here
    heard: float = field(default_factory=time.monotonic)


class Prefetcher:
    """Prompts of one rank's positions, built by workers.

    Args:
        stream: says which positions the rank will need and where their samples lie.
        module: run as ``python -m module CHANNEL PARENT`` in each worker; it calls `data.serve.serve`.
        setup: first message to each worker.
        bounds: of what is built ahead.
    """

    def __init__(self, stream: Stream, module: str, setup: bytes, bounds: Bounds) -> None:
        self._stream, self._module, self._setup, self._bounds = stream, module, setup, bounds
        self._next = stream.positions(stream.dp_size)[0]  # the first position that was not asked for
        self._done: dict[int, int | Damage] = {}  # position -> descriptor of the memory that holds its prompt
        self._done_bytes = 0
        self._spare: int | None = None  # memory that was read, to go along with the next request
        self._again: deque[int] = deque()  # positions that a worker which is gone was asked for
        self._deaths: Counter[int] = Counter()
        self._failed_starts = 0
        self._workers = [self._start() for _ in range(bounds.workers)]
        self._ask()

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return [worker.process.pid for worker in self._workers]

    def read(self, positions: Sequence[int]) -> list[Item]:
        """Return the prompts with their samples, or the damage, at the stream's next positions of this rank.

        Raises:
            ValueError: what the workers were set up with does not fit together; one line.
            RuntimeError: workers die before they have started.
        """
        self._take_all(0)
        return [self._wait_for(position) for position in positions]

    def close(self) -> None:
        """End the workers and free what they have built."""
        for worker in self._workers:
            worker.channel.close()
        for worker in self._workers:
            _end(worker.process)
        for done in self._done.values():
            if not isinstance(done, Damage):
                os.close(done)
        self._workers, self._done = [], {}

    def _wait_for(self, position: int) -> Item:
        started = time.monotonic()
        while position not in self._done:
            self._ask()
            self._take_all(min(1.0, self._bounds.timeout_s / 4))
            for worker in list(self._workers):
                silent = time.monotonic() - max(worker.heard, started)
                limit = self._bounds.timeout_s if worker.started else max(_START_S, self._bounds.timeout_s)
                if position in worker.jobs and silent > limit:
                    logger.warning("data worker %d says nothing for %.0f s; killed", worker.process.pid, silent)
                    worker.process.kill()
                    self._replace(worker)
        done = self._done.pop(position)
        mark()
        if isinstance(done, Damage):
            return done
        self._done_bytes -= os.fstat(done).st_size
        try:
            return handover.read_item(done)
        finally:
            self._spare = done
            self._ask()
            self._drop_spare()

    def _drop_spare(self) -> None:
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None

    def _ask(self) -> None:
        """Ask for what is to be read again, then for further positions as far as the bounds allow."""
        while self._again and self._request(self._again[0]):
            self._again.popleft()
        while not self._again and self._has_room() and self._request(self._next):
            self._next += self._stream.dp_size

    def _has_room(self) -> bool:
        bounds, asked = self._bounds, sum(len(worker.jobs) for worker in self._workers)
        if asked + len(self._done) == 0:
            return True
        fits = self._done_bytes + (asked + 1) * bounds.sample_bytes <= bounds.bytes
        return fits and asked + len(self._done) < bounds.samples

    def _request(self, position: int) -> bool:
        """Ask whoever has least to do for one position; return whether the channel had room for the request."""
        worker = min(self._workers, key=lambda w: len(w.jobs))
        body = msgpack.packb(self._stream.reference(position), unicode_errors="surrogateescape")
        spare, self._spare = self._spare, None
        try:
            handover.send(worker.channel, handover.REQUEST, position, body, spare)
        except BlockingIOError:
            return False
        except OSError:  # it is gone, which its end of the channel will say; it is asked for again
            logger.debug("data worker %d is gone", worker.process.pid)
        worker.jobs.append(position)
        return True

    def _take_all(self, timeout_s: float) -> None:
        """Take all messages that are there; wait for one at most so long."""
        by_fd = {worker.channel.fileno(): worker for worker in self._workers}
        ready, _, _ = select.select(list(by_fd), [], [], timeout_s)
        for fd in ready:
            while self._take(by_fd[fd]):
                continue

    def _take(self, worker: _Worker) -> bool:
        try:
            message = handover.receive(worker.channel)
        except BlockingIOError:
            return False
        if message is None:
            self._replace(worker)
            return False
        kind, position, body, fd = message
        worker.heard = time.monotonic()
        if kind == handover.READY:
            worker.started, self._failed_starts = True, 0
        elif kind == handover.BEGUN:
            worker.begun = position
        elif kind == handover.REFUSED:
            raise ValueError(handover.body_of(body, fd).decode())
        elif kind == handover.DONE:
            assert fd is not None and worker.jobs[0] == position
            worker.jobs.popleft()
            self._done[position] = fd
            self._done_bytes += os.fstat(fd).st_size
        return True

    def _replace(self, worker: _Worker) -> None:
        """Start another worker in place of one that is gone or hangs, and ask it for what that one owes."""
        worker.channel.close()
        code = _end(worker.process)
        logger.warning("data worker %d ended with %d; starting another", worker.process.pid, code)
        begun = worker.begun
        if begun is not None and begun in worker.jobs:
            self._deaths[begun] += 1
            if self._deaths[begun] >= _MAX_DEATHS:
                worker.jobs.remove(begun)
                self._done[begun] = Damage("", "", f"{_MAX_DEATHS} data workers died on it")
        elif not worker.started:
            self._failed_starts += 1
            if self._failed_starts >= _MAX_DEATHS:
                raise RuntimeError(f"data workers end with {code} before they have started; see above")
        self._workers[self._workers.index(worker)] = self._start()
        self._again = deque(sorted([*self._again, *worker.jobs]))
        self._ask()

    def _start(self) -> _Worker:
        mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its:
            process = subprocess.Popen(  # noqa: S603 - our own module, no shell
                [sys.executable, "-m", self._module, str(its.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(its.fileno(),),
                env=os.environ | _KEEP_MEMORY,
                start_new_session=True,  # signals meant for the job are the rank's to answer
            )
        handover.send(mine, handover.REQUEST, 0, self._setup)
        mine.setblocking(False)
        return _Worker(process, mine)


def _end(process: subprocess.Popen[bytes]) -> int:
    """Wait for a process whose channel is closed, kill it if it does not end, and return its exit code."""
    try:
        return process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
