"""Where the runs of a scaling study are started: processes of this machine, or jobs of a SLURM cluster."""

from __future__ import annotations

import functools
import logging
import os
import subprocess
from contextlib import suppress
from pathlib import Path

from megatron_vlmr1 import config
from megatron_vlmr1.launch import slurm
from megatron_vlmr1.launch.cluster import Cluster
from megatron_vlmr1.launch.local import GRACE_S, ORDERLY_GRACE_S, rank_command
from megatron_vlmr1.launch.submit import Request, submit
from megatron_vlmr1.plan.study import Cell
from megatron_vlmr1.runtime.children import die_with_parent

log = logging.getLogger(__name__)

_LOG = "job.log"
_ALIVE = {
    "PENDING",
    "CONFIGURING",
    "RUNNING",
    "COMPLETING",
    "REQUEUED",
    "REQUEUE_HOLD",
    "REQUEUE_FED",
    "RESIZING",
    "SIGNALING",
    "STAGE_OUT",
    "STOPPED",
    "SUSPENDED",
}


class LocalJobs:
    """One job after another on this machine, each with all of its ranks."""

    at_once = 1
    poll_s = 0.1
    outlive = False

    def __init__(self, config_file: Path) -> None:
        self._config_file = config_file
        self._running: subprocess.Popen[bytes] | None = None

    def start(self, cell: Cell, run_dir: Path, retry: bool) -> str:
        """Start ``vlmr1 train``; its output goes to the run's job.log."""
        words = ["train", str(self._config_file), "--nproc", str(cell.ranks), *["--retry"] * retry, *cell.overrides]
        run_dir.mkdir(parents=True, exist_ok=True)
        with self.log(run_dir).open("wb") as log:
            self._running = subprocess.Popen(  # noqa: S603 - our own command, as a list
                rank_command(words),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=functools.partial(die_with_parent, os.getpid()),
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


class SlurmJobs:
    """Jobs of a cluster, at most `at_once` in its queue; they outlive this process and are found again."""

    poll_s = 5.0
    outlive = True

    def __init__(self, config_file: Path, cluster: Cluster, at_once: int, time: str | None) -> None:
        self.at_once = at_once
        self._config_file, self._cluster, self._time = config_file, cluster, time

    def start(self, cell: Cell, run_dir: Path, retry: bool) -> str:
        """Submit the cell; return the job's id."""
        cfg = config.load(self._config_file, list(cell.overrides))
        (job,) = submit(Request(cfg, self._cluster, cell.nodes, time=self._time, retry=retry))
        return job

    def alive(self, job: str) -> bool:
        """Whether SLURM has it waiting or running; a controller that does not answer for a while is asked again."""
        try:
            return slurm.job_state(job) in _ALIVE
        except ValueError as error:
            log.warning("job %s: %s", job, error)
            return True

    def stop(self) -> None:
        """Leave the jobs in the queue."""

    def log(self, run_dir: Path) -> Path:
        """Return the batch script's output."""
        return max(
            (run_dir / "logs").glob("slurm_*.log"), key=lambda path: path.stat().st_mtime, default=run_dir / _LOG
        )
