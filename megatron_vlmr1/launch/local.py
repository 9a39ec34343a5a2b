"""The ranks of one machine as child processes: `vlmr1 train --nproc N`.

Every rank leads a session of its own, so a Ctrl-C in the terminal reaches the launcher only, and what a dead rank
leaves behind can be found. The kernel kills the ranks when the launcher dies.
"""

from __future__ import annotations

import functools
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO, Any

from megatron_vlmr1 import errors
from megatron_vlmr1.runtime import attempts
from megatron_vlmr1.runtime.attempts import OUTCOME, read_outcome, write_outcome
from megatron_vlmr1.runtime.children import die_with_parent, kill_sessions

GRACE_S = 3.0  # between SIGTERM and SIGKILL, once a rank has crashed
ORDERLY_GRACE_S = 10.0  # for the others to leave by themselves, once a rank has left with one of our own exit codes
INSIST_S = 2.0  # a second Ctrl-C kills when it comes this much later than the first, so that one is not taken for two
_POLL_S = 0.05
_SAID = {errors.BAD_INPUT, errors.STOPPED, errors.REQUEUE}  # codes that a rank explains itself
_ORDERLY = {errors.DIFFERS, *_SAID}
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def rank_command(argv: Sequence[str]) -> list[str]:
    """Return the command of one rank: this program with the arguments `argv`."""
    return [sys.executable, "-m", "megatron_vlmr1.cli", *argv]


def new_attempt(run_dir: str | Path) -> Path:
    """Make and return ``run_dir/logs/attempt_K``; K counts from 0.

    Raises:
        OSError: it cannot be made, or another attempt took the same number just now.
    """
    former = attempts.newest(Path(run_dir))
    path = Path(run_dir) / "logs" / f"attempt_{0 if former is None else attempts.number(former) + 1}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir()
    return path


def run_ranks(nproc: int, command: Sequence[str], log_dir: str | Path, env: Mapping[str, str] | None = None) -> int:
    """Run `command` as `nproc` ranks and wait for all of them. Main thread only.

    Each rank finds RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT in its environment,
    VLMR1_INIT_METHOD (a file, which unlike a port nobody else can take), VLMR1_LOG_DIR (`log_dir`), and its share of
    the cores as OMP_NUM_THREADS unless that is set. Its output goes to ``log_dir/rank_K.log``; rank 0's also to this
    process's stdout and stderr.

    When a rank fails, the others get SIGTERM and soon after SIGKILL, with all their descendants. The first SIGINT,
    SIGTERM or SIGUSR1 of this process is passed on to the ranks, once. A second SIGINT or SIGTERM, at least `INSIST_S`
    after the first, kills them.

    Args:
        nproc: number of ranks.
        command: program and arguments, as from `rank_command`.
        log_dir: made if missing.
        env: variables that override this process's own.

    Returns:
        130 or 143 when a second SIGINT or SIGTERM killed the ranks; else the code in ``log_dir/outcome.json``
        (``{"reason", "code", "step"}``) if the ranks wrote one; else the exit code of the first rank that failed,
        128 + n for signal n; else 0.

    Raises:
        OSError: a rank cannot be started or a log not be written; no rank is left running.
    """
    assert threading.current_thread() is threading.main_thread(), "signal handlers and the ranks' parent"
    log_dir = Path(log_dir)
    log_dir.mkdir(parents=True, exist_ok=True)
    (log_dir / OUTCOME).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="vlmr1-") as meeting_place, _remembered_signal() as came:
        job = _Job(log_dir)
        try:
            shared = {**_shared_environment(nproc, log_dir, meeting_place), **(env or {})}
            for rank in range(nproc):
                job.start(command, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            job.wait(came)
        finally:
            job.end()
    return _conclude(job, log_dir)


class _Job:
    """The running ranks, and the order in which they left."""

    def __init__(self, log_dir: Path) -> None:
        self.log_dir = log_dir
        self.ranks: list[subprocess.Popen[bytes]] = []
        self.first_failure: int | None = None
        self.killed_by: int | None = None  # the second signal of somebody who would not wait
        self._asked = False
        self._left: queue.Queue[int] = queue.Queue()
        self._threads: list[threading.Thread] = []
        self._deadlines: list[tuple[float, signal.Signals]] = []
        self._files = ExitStack()

    def start(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        """Start the next rank."""
        log = self._files.enter_context(log_path(self.log_dir, len(self.ranks)).open("wb", buffering=0))
        first = not self.ranks
        process = subprocess.Popen(  # noqa: S603 - our own command, as a list
            list(command),
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if first else log,
            stderr=subprocess.PIPE if first else log,
            start_new_session=True,
            preexec_fn=functools.partial(die_with_parent, os.getpid()),
        )
        self.ranks.append(process)
        if first:
            pipes = ((process.stdout, log, sys.stdout.buffer), (process.stderr, log, sys.stderr.buffer))
            self._threads = [threading.Thread(target=_tee, args=pipe, daemon=True) for pipe in pipes]

    def wait(self, came: Sequence[tuple[int, float]]) -> None:
        """Wait until every rank is gone; `came` receives the signals of this process and when they came."""
        # A thread for each rank tells the true order of their ends, which names the culprit.
        # They are started last because forking beside running threads is unsafe.
        ranks = range(len(self.ranks))
        waiters = [threading.Thread(target=self._wait_for, args=(rank,), daemon=True) for rank in ranks]
        for thread in self._threads + waiters:
            thread.start()
        alive = len(self.ranks)
        while alive:
            with suppress(queue.Empty):
                self._note_end(self._left.get(timeout=_POLL_S))
                alive -= 1
            self._obey(came)
            while self._deadlines and time.monotonic() >= self._deadlines[0][0]:
                self._signal(self._deadlines.pop(0)[1])

    def end(self) -> None:
        """Kill whatever is left of the ranks and their descendants, and close the logs."""
        sessions = {process.pid for process in self.ranks}
        until = time.monotonic() + GRACE_S
        while kill_sessions(sessions) and time.monotonic() < until:
            time.sleep(_POLL_S)
        for process in self.ranks:
            process.wait()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(GRACE_S)  # a blocked terminal must not hold up the end
        self._files.close()

    def _note_end(self, rank: int) -> None:
        status = self.ranks[rank].returncode
        if status == 0 or self.first_failure is not None:
            return
        self.first_failure = rank
        term = time.monotonic() + (ORDERLY_GRACE_S if status in _ORDERLY else 0.0)
        self._deadlines = [(term, signal.SIGTERM), (term + GRACE_S, signal.SIGKILL)]

    def _obey(self, came: Sequence[tuple[int, float]]) -> None:
        """Pass the first signal on; kill the ranks once somebody insists."""
        if came and not self._asked:
            self._asked = True
            self._signal(came[0][0])
            _say(f"{signal.Signals(came[0][0]).name}: asked the ranks to stop and save; a second Ctrl-C kills them")
        ending = [(number, at) for number, at in came if number in (signal.SIGINT, signal.SIGTERM)]
        insisting = [number for number, at in ending if at - ending[0][1] >= INSIST_S]
        if insisting and self.killed_by is None:
            self.killed_by = insisting[0]
            self._signal(signal.SIGKILL)
            _say(f"{signal.Signals(insisting[0]).name} again: killed the ranks")

    def _wait_for(self, rank: int) -> None:
        self.ranks[rank].wait()
        self._left.put(rank)

    def _signal(self, number: int) -> None:
        if number == signal.SIGKILL:
            kill_sessions({process.pid for process in self.ranks})
            return
        for process in self.ranks:
            process.send_signal(number)  # does nothing for one that has left


def log_path(log_dir: Path, rank: int) -> Path:
    """Return the log file of `rank`."""
    return log_dir / f"rank_{rank}.log"


@contextmanager
def _remembered_signal() -> Iterator[list[tuple[int, float]]]:
    came: list[tuple[int, float]] = []

    def remember(number: int, frame: FrameType | None) -> None:
        came.append((number, time.monotonic()))

    former = {number: signal.signal(number, remember) for number in _FORWARDED}
    try:
        yield came
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _shared_environment(nproc: int, log_dir: Path, meeting_place: str) -> dict[str, str]:
    return {
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // nproc)),
        **os.environ,
        "PYTHONUNBUFFERED": "1",  # or a killed rank's last lines are lost
        "PYTHONFAULTHANDLER": "1",  # a traceback for a crash in native code
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "VLMR1_INIT_METHOD": Path(meeting_place, "rendezvous").as_uri(),
        "VLMR1_LOG_DIR": str(log_dir.resolve()),
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _tee(source: IO[bytes], *sinks: IO[bytes]) -> None:
    """Copy `source` to each of `sinks` for as long as it can be written."""
    open_sinks = list(sinks)
    while chunk := os.read(source.fileno(), 1 << 16):
        for sink in tuple(open_sinks):
            try:
                sink.write(chunk)
                sink.flush()
            except (OSError, ValueError):  # the reader of the terminal has gone, or the disk is full
                open_sinks.remove(sink)  # the rank must not block: go on with the other


def _conclude(job: _Job, log_dir: Path) -> int:
    if job.killed_by is not None:
        return _note_kill(job.killed_by, log_dir)
    outcome = _read_outcome(log_dir)
    rank = job.first_failure
    if rank is None:
        return int(outcome["code"]) if outcome else errors.DONE
    status = job.ranks[rank].returncode
    code = int(outcome["code"]) if outcome else (128 - status if status < 0 else status)
    log = log_path(log_dir, rank)
    if status in _SAID and job.ranks[0].returncode == status:
        return code  # rank 0 has said why, and the user wants one line
    words = _last_words(log) or (f" ({outcome['reason']})" if outcome and code == errors.CRASHED else "")
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"left with exit code {status}"
    _say(f"rank {rank} (pid {job.ranks[rank].pid}) {how}; its log: {log}{words}")
    return code


def _note_kill(number: int, log_dir: Path) -> int:
    """Keep on record that somebody meant this end; return the exit code."""
    code = 128 + number
    with suppress(OSError):
        write_outcome(log_dir, f"killed by a second {signal.Signals(number).name}", code, None)
    return code


def _last_words(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    said = [line.partition("error: ")[2] for line in lines if line.startswith("vlmr1") and "error: " in line]
    return f" ({said[-1]})" if said else ""


def _read_outcome(log_dir: Path) -> dict[str, Any] | None:
    try:
        return read_outcome(log_dir)
    except (OSError, ValueError) as error:
        _say(f"{log_dir / OUTCOME} is not readable: {error}")
        return None


def _say(line: str) -> None:
    print(f"vlmr1: {' '.join(line.split())}", file=sys.stderr, flush=True)
