"""Jobs of the real program with faults in them, watched from outside: when each process went, and what is left."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

import megatron_vlmr1
from megatron_vlmr1.drill.faults import Fault, to_text
from megatron_vlmr1.drill.inject import FIRED
from megatron_vlmr1.errors import DONE
from megatron_vlmr1.runtime.children import die_with_parent

LIMIT_S = 600.0  # no job of the drill takes longer
_MARK = "VLMR1_DRILL_JOB"
_POLL_S = 0.02
_LAST_BYTES = 1500


class Missed(Exception):
    """A figure of the matrix was not met; says how."""


def need(met: bool, otherwise: str) -> None:
    """Go on if `met`.

    Raises:
        Missed: `otherwise`.
    """
    if not met:
        raise Missed(otherwise)


@dataclass(frozen=True)
class Ended:
    """How a job went.

    Attributes:
        code: the launcher's exit code; -n for signal n.
        output: what it printed.
        fired: the faults that happened, as `inject` wrote them down.
        survived_s: seconds from the first fault until the launcher had left, and with it every rank.
        emptied_s: seconds from the first fault until no process of the job was left.
    """

    code: int
    output: str
    fired: tuple[dict[str, Any], ...]
    survived_s: float
    emptied_s: float

    def expect(self, code: int) -> Ended:
        """Return this job if it left with `code`.

        Raises:
            Missed: it left with another.
        """
        need(self.code == code, f"exit code {self.code} instead of {code}; its last words: {self.last_words}")
        return self

    @property
    def last_words(self) -> str:
        """The end of the output, in one line."""
        return " ".join(self.output[-_LAST_BYTES:].split())


class Job:
    """One started job; leaving the block kills what is left of it."""

    def __init__(self, words: Sequence[str], name: Path) -> None:
        """Start ``python -m words…``; what it prints and its faults go into files whose names begin as `name`."""
        self._mark = uuid.uuid4().hex
        self._output = name.with_name(f"{name.name}.{self._mark[:8]}.log")
        self._fired = self._output.with_suffix(".fired")
        with self._output.open("wb") as out:
            self.process = subprocess.Popen(  # noqa: S603 - our own program, as a list
                [sys.executable, "-m", *words],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=self._environment(),
                start_new_session=True,
                preexec_fn=functools.partial(die_with_parent, os.getpid()),
            )

    def _environment(self) -> dict[str, str]:
        root = str(Path(megatron_vlmr1.__file__).parents[1])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        return {**os.environ, "PYTHONPATH": path, "VLMR1_LOG": "INFO", _MARK: self._mark, FIRED: str(self._fired)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for process in self.alive():
            process.kill()
        self.process.wait()

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self._output.read_text(errors="replace")

    @property
    def fired(self) -> tuple[dict[str, Any], ...]:
        """The faults that have happened so far."""
        lines = self._fired.read_text().splitlines() if self._fired.is_file() else []
        return tuple(json.loads(line) for line in lines)

    def alive(self) -> list[psutil.Process]:
        """Every process of the job, whoever its parent is by now; zombies don't count."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(_MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def wait_until(self, happened: Callable[[], bool], what: str, within_s: float = LIMIT_S) -> None:
        """Wait for something.

        Raises:
            Missed: it has not happened in time, or the job has ended without it.
        """
        end = time.monotonic() + within_s
        while not happened():
            if self.process.poll() is not None and not happened():
                raise Missed(f"the job ended ({self.process.returncode}) before {what}: {self.output[-_LAST_BYTES:]}")
            need(time.monotonic() < end, f"{what}: not within {within_s:g} s: {self.output[-_LAST_BYTES:]}")
            time.sleep(_POLL_S)

    def wait_for(self, text: str) -> None:
        """Wait until the output holds `text`."""
        self.wait_until(lambda: text in self.output, f"saying {text!r}")

    def finish(self, since: float | None = None) -> Ended:
        """Wait for its end and for that of everything it started.

        Args:
            since: unix time that seconds are counted from, instead of the first fault's.

        Raises:
            Missed: it does not end.
        """
        try:
            code = self.process.wait(LIMIT_S)
        except subprocess.TimeoutExpired as error:
            raise Missed(f"the job does not end within {LIMIT_S:g} s: {self.output[-_LAST_BYTES:]}") from error
        left = time.time()
        end = time.monotonic() + 30.0
        while (alive := self.alive()) and time.monotonic() < end:
            time.sleep(_POLL_S)
        need(not alive, f"{len(alive)} processes outlived the job by 30 s: {[' '.join(p.cmdline()) for p in alive]}")
        fired = self.fired
        start = since if since is not None else fired[0]["unix_s"] if fired else left
        return Ended(code, self.output, fired, left - start, time.time() - start)

    def kill_launcher(self) -> Ended:
        """Kill -9 the launcher and wait for what follows."""
        now = time.time()
        self.process.send_signal(signal.SIGKILL)
        return self.finish(since=now)


def start(config: Path, ranks: int, faults: Sequence[Fault] = (), entry: Sequence[str] = ()) -> Job:
    """Start ``vlmr1 train`` on `config`.

    Args:
        config: of the run.
        ranks: on this machine.
        faults: that happen in it.
        entry: another module of the drill with its own words, in place of the entry point that injects `faults`.
    """
    entry = entry or ("megatron_vlmr1.drill.entry", to_text(faults))
    words = [*entry, "--", "train", str(config), "--nproc", str(ranks)]
    return Job(words, config.with_suffix(""))


def run(config: Path, ranks: int, fault: Fault | Sequence[Fault] = ()) -> Ended:
    """Run ``vlmr1 train`` on `config` with so many ranks, with a fault or several in it, to its end.

    Raises:
        Missed: a fault did not happen, or the job does not end.
    """
    faults = [fault] if isinstance(fault, Fault) else list(fault)
    with start(config, ranks, faults) as job:
        ended = job.finish()
    need(len(ended.fired) == len(faults), f"{len(ended.fired)} of {len(faults)} faults happened: {ended.last_words}")
    return ended


def succeed(config: Path, ranks: int, entry: Sequence[str] = ()) -> Ended:
    """Run ``vlmr1 train`` undisturbed; `entry` as for `start`.

    Raises:
        Missed: it did not end well.
    """
    with start(config, ranks, entry=entry) as job:
        return job.finish().expect(DONE)
