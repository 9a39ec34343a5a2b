"""Where the runs of a scaling study are started: processes of this machine, or jobs of a SLURM cluster."""

from __future__ import annotations

import subprocess
from contextlib import suppress
from pathlib import Path

from megatron_vlmr1.launch.local import GRACE_S, ORDERLY_GRACE_S, rank_command
from megatron_vlmr1.plan.study import Cell

_LOG = "job.log"


class LocalJobs:
    """One job after another on this machine, each with all of its ranks."""

    at_once = 1
    poll_s = 0.1

    def __init__(self, config_file: Path) -> None:
        self._config_file = config_file
        self._running: subprocess.Popen[bytes] | None = None

    def start(self, cell: Cell, run_dir: Path, retry: bool) -> str:
        """Start ``vlmr1 train``; its output goes to the run's job.log."""
        words = ["train", str(self._config_file), "--nproc", str(cell.ranks), *["--retry"] * retry, *cell.overrides]
        run_dir.mkdir(parents=True, exist_ok=True)
        with self.log(run_dir).open("wb") as log:
            self._running = subprocess.Popen(  # noqa: S603 - our own command, as a list
                rank_command(words), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        return str(self._running.pid)

    def alive(self, job: str) -> bool:
        """Whether it runs; what an earlier process had started ended with that process."""
        running = self._running
        return running is not None and str(running.pid) == job and running.poll() is None

    def stop(self) -> None:
        """Ask a running job to save and to leave, and wait for it; kill it if it does not."""
        if self._running is None or self._running.poll() is not None:
            return
        self._running.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._running.wait(10 * ORDERLY_GRACE_S + GRACE_S)
        self._running.kill()
        self._running.wait()

    def log(self, run_dir: Path) -> Path:
        """Return the job's output."""
        return run_dir / _LOG
