"""Runs of the tiny model, and of a stand-in for the program, submitted to the SLURM of one machine."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from megatron_vlmr1 import config
from megatron_vlmr1.drill import digests
from megatron_vlmr1.launch import cluster, slurm
from megatron_vlmr1.launch.submit import Request, submit
from megatron_vlmr1.runtime import heartbeat
from tests import jobs
from tests.slurm.one_machine import OneMachine

STEPS = 10
WAIT_S = 120.0
_ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
_STAND_IN = """\
#!{python}
# What a rank's interpreter is here: says who it is, and does what the test wants of it.
import json, os, signal, sys, time
from pathlib import Path
from megatron_vlmr1.runtime.attempts import write_outcome
from megatron_vlmr1.runtime.ranks import identity
import megatron_vlmr1
me, log_dir = identity(), Path(os.environ["VLMR1_LOG_DIR"])
rank = me.rank
node = os.environ["SLURMD_NODENAME"]
devices = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
told = {{"rank": rank, "world": me.world, "node": node, "package": megatron_vlmr1.__file__,
        "cwd": os.getcwd(), "words": sys.argv[1:], "extra": os.environ.get("EXTRA"),
        "gpu": devices[me.local_rank], "visible": len(devices)}}
print(json.dumps(told), flush=True)
(log_dir / f"here_{{rank}}").touch()
def outcome(reason, code):
    if rank == 0:
        while len(list(log_dir.glob("here_*"))) < me.world:
            time.sleep(0.05)
        write_outcome(log_dir, reason, code, None)
    while not (log_dir / "outcome.json").exists():
        time.sleep(0.05)
    sys.exit(code)
attempt = int(log_dir.name.removeprefix("attempt_"))
{act}
"""


@dataclass
class Submitted:
    """A run and its jobs."""

    run_dir: Path
    jobs: list[str]

    @property
    def log(self) -> str:
        """What the batch scripts said."""
        return "".join(path.read_text() for path in sorted((self.run_dir / "logs").glob("slurm_*.log")))

    def attempt(self, number: int) -> Path:
        """An attempt's logs."""
        return self.run_dir / "logs" / f"attempt_{number}"

    def outcome(self, number: int) -> dict[str, Any]:
        """How an attempt ended."""
        return json.loads((self.attempt(number) / "outcome.json").read_text())

    def attempts(self) -> int:
        """How many there were."""
        return len(list((self.run_dir / "logs").glob("attempt_*")))

    def said(self, number: int = 0) -> list[dict[str, Any]]:
        """What the stand-ins of an attempt said, by rank."""
        files = sorted(self.attempt(number).glob("rank_*.log"), key=lambda path: int(path.stem[5:]))
        return [json.loads(path.read_text().splitlines()[0]) for path in files]

    def steps(self) -> int:
        """Steps on record."""
        path = self.run_dir / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def pids(self, number: int) -> dict[int, int]:
        """Process ids of an attempt's ranks."""
        return {record.rank: record.pid for record in heartbeat.read_all(self.attempt(number))}

    @contextmanager
    def stopped(self) -> Iterator[list[int]]:
        """Stop the ranks of the first attempt once it has done a step, and let them go on afterwards."""
        self.until(lambda: self.steps() >= 1, "a step")
        pids = list(self.pids(0).values())
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield pids
        finally:
            for pid in pids:
                with suppress(ProcessLookupError):  # SLURM has let it go on, and it has left
                    os.kill(pid, signal.SIGCONT)

    def preempt(self, pids: list[int]) -> None:
        """Have SLURM send SIGUSR1 to the steps of the first job, and wait until it has come to the stopped ranks."""
        subprocess.run(["scancel", "--signal=USR1", self.jobs[0]], check=True)
        self.until(lambda: all(pending(pid, signal.SIGUSR1) for pid in pids), "the signal")

    def until(self, happened: Callable[[], Any], what: str, within_s: float = WAIT_S) -> float:
        """Wait for something; return how long it took."""
        start = time.monotonic()
        while not happened():
            assert time.monotonic() < start + within_s, f"{what}: not within {within_s:g} s; {self.log}"
            time.sleep(0.05)
        return time.monotonic() - start

    def state(self, link: int = 0) -> str | None:
        """What SLURM says of a job."""
        return slurm.job_state(self.jobs[link])

    def end(self, link: int = 0) -> str | None:
        """Wait for the end of a job; return its state."""
        self.until(lambda: self.state(link) in _ENDED, "the job's end")
        return self.state(link)


class Runs:
    """Makes runs."""

    def __init__(self, machine: OneMachine, shards: Path, root: Path) -> None:
        self.machine, self.shards, self.root = machine, shards, root

    def submit(self, name: str, sections: dict[str, Any] | None = None, **facts: Any) -> Submitted:
        """Submit a run of the tiny model; `facts` are of the request or of the cluster."""
        folder = self.root
        settings = {
            "parallel": {"tensor_model_parallel_size": 1},
            "data": {"train": str(self.shards), "lanes": 16},
            "train": {"steps": STEPS, "save_every": 3},
            **(sections or {}),
        }
        cfg = config.load(jobs.write_config(folder, self.shards, name, **settings))
        asked = {key: facts.pop(key) for key in ("nodes", "chain", "rewards_nodes") if key in facts}
        file = folder / f"{name}.cluster.yaml"
        file.write_text(
            yaml.safe_dump({"partition": "ci", "time": "10", "cpu_bind": "none", "reward_cpus": 1, **facts})
        )
        request = Request(cfg, cluster.load(str(file)), **{"nodes": 2, **asked})
        return Submitted(request.run_dir, submit(request))

    def stand_in(self, name: str, act: str, sections: dict[str, Any] | None = None, **facts: Any) -> Submitted:
        """Submit a run in which a stand-in does `act` in place of the program."""
        python = self.root / f"{name}.venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(_STAND_IN.format(python=sys.executable, act=act))
        python.chmod(python.stat().st_mode | stat.S_IXUSR)
        return self.submit(name, sections, venv=str(python.parents[1]), **facts)

    @cached_property
    def whole(self) -> Submitted:
        """The run that nobody disturbed."""
        run = self.submit("whole")
        assert run.end() == "COMPLETED", run.log
        return run

    def same_as_whole(self, run: Submitted) -> None:
        """Compare a run's last checkpoint with the undisturbed run's, bit for bit."""
        digests.same(digests.state(run.run_dir, STEPS), digests.state(self.whole.run_dir, STEPS))


def scontrol(*words: str) -> None:
    """Run scontrol."""
    subprocess.run(["scontrol", *words], check=True, capture_output=True)


def pending(pid: int, number: int) -> bool:
    """Whether a signal waits for a stopped process, or has been its end."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except FileNotFoundError:
        return True
    masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd", "ShdPnd"))]
    return any(mask >> (number - 1) & 1 for mask in masks)
