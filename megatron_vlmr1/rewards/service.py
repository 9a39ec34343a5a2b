"""The reward service as a child process of one rank of the node."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from megatron_vlmr1.config import RewardsConfig
from megatron_vlmr1.rewards import server
from megatron_vlmr1.rewards.client import RewardClient
from megatron_vlmr1.rewards.pool import PoolSettings
from megatron_vlmr1.runtime.children import kill_sessions

_START_S = 60.0
_STOP_S = 10.0
_HUNG_S = 15.0  # a service that answers no ping for this long is killed and started anew
_TICK_S = 0.5
_TOLD_BYTES = 1 << 16  # of the service's log, read for warnings at a time
_WARNING = re.compile(rb"^[\d-]+ [\d:,]+ ((?:WARNING|ERROR) .{0,300})", re.MULTILINE)  # as the service logs them
_MAX_PATH_BYTES = 107  # of a unix socket

logger = logging.getLogger(__name__)


class RewardService:
    """Starts the service, watches it, starts it again when it dies or hangs, ends it.

    The process is in a session of its own, so that signals meant for the job (Ctrl-C, SLURM's warning) don't end it
    before its last scores are in; it ends by itself when its parent is gone.
    """

    def __init__(self, config: RewardsConfig, log_dir: Path, functions: Sequence[Path] = ()) -> None:
        """Prepare, start nothing.

        Args:
            config: workers, deadline and memory limit.
            log_dir: gets ``rewards.log``, what the service and its processes print.
            functions: Python files with rewards of the user's own.

        Raises:
            ValueError: a setting is out of range, a file is missing, or the temporary directory's path is too long
                for a socket.
        """
        files = tuple(os.path.abspath(path) for path in functions)
        settings = PoolSettings(config.workers, config.deadline_s, config.memory_bytes, files)
        self.restarts = 0
        self.log_path = log_dir / "rewards.log"
        self._directory = Path(tempfile.mkdtemp(prefix="vlmr1-"))
        socket_path = self._directory / "rewards"
        if len(os.fsencode(socket_path)) > _MAX_PATH_BYTES:
            self._directory.rmdir()
            raise ValueError(f"{self._directory}: path too long for a socket; set TMPDIR to a shorter one")
        self.address = f"ipc://{socket_path}"
        self._command = [*server.command(self.address, settings), "--parent", str(os.getpid())]
        self._told = 0  # bytes of the log that were looked through
        self._closing = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="reward-service", daemon=True)

    def __enter__(self) -> Self:
        """Start the service and wait until it answers.

        Raises:
            RuntimeError: it does not; the message ends with the last line of its log.
        """
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        self._told = self.log_path.stat().st_size if self.log_path.is_file() else 0  # an earlier service's
        self._watcher.start()
        end = time.monotonic() + _START_S
        with RewardClient(self.address) as client:
            while not client.alive(0.2):
                if self.restarts or time.monotonic() > end:
                    self.close()
                    lines = self.log_path.read_text(errors="replace").splitlines() or ["(empty)"]
                    raise RuntimeError(f"the reward service does not start; {self.log_path}: {lines[-1]}")
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the service and its processes, and remove the socket."""
        self._closing.set()
        self._watcher.join()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _watch(self) -> None:
        """Keep one service process running until `close`.

        In a thread, since this rank may be in a collective with a rank that waits for scores; and the process is
        started here, since the kernel's parent-death signal goes by the thread that started it.
        """
        with RewardClient(self.address) as client:
            while True:
                process = self._start()
                heard = time.monotonic()
                while process.poll() is None and not self._closing.wait(_TICK_S):
                    self._pass_warnings_on()
                    if client.alive(_TICK_S):
                        heard = time.monotonic()
                    elif time.monotonic() - heard > _HUNG_S:
                        logger.error("reward service (process %d) does not answer; killed", process.pid)
                        process.kill()
                        process.wait()
                if self._closing.is_set():
                    _stop(process)
                    return self._pass_warnings_on()
                logger.error("reward service (process %d) ended: %s; restarting", process.pid, process.returncode)
                kill_sessions([process.pid])  # a reward process that was just starting may have outlived it
                self.restarts += 1

    def _pass_warnings_on(self) -> None:
        """Repeat in this process's log what the service has warned of since the last call: dead workers, retries."""
        try:
            with self.log_path.open("rb") as log:
                log.seek(self._told)
                chunk = log.read(_TOLD_BYTES)
        except OSError:
            return  # somebody moved it; the service needs its watcher more than we need its words
        lines, newline, rest = chunk.rpartition(b"\n")
        if len(rest) == _TOLD_BYTES:  # no record is as long as that
            lines = rest
        self._told += len(lines) + len(newline)
        for found in _WARNING.findall(lines):
            logger.warning("reward service: %s", found.decode(errors="replace"))

    def _start(self) -> subprocess.Popen[bytes]:
        with self.log_path.open("ab") as output:
            return subprocess.Popen(  # noqa: S603 - our own module, no shell
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=server.environment(),
                start_new_session=True,
            )


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    kill_sessions([process.pid])
