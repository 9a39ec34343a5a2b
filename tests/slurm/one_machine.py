"""A SLURM of several "nodes" on this machine: its own munged, slurmctld and slurmds, in a directory of their own."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

CPUS = 16  # that each node claims to have
GPUS = 8  # pretended
TRAINERS = ("n1", "n2", "n3")  # partition "ci": two for the jobs, one to spare
CPU_NODES = ("c1",)  # partition "cpu"
_DAEMONS = ("munged", "slurmctld", "slurmd")

_CONF = """\
ClusterName=ci
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={base}/munge.socket,cred_expire=5
StateSaveLocation={base}/state
SlurmctldPidFile={base}/slurmctld.pid
SlurmctldLogFile={base}/slurmctld.log
SlurmdPidFile={base}/slurmd.%n.pid
SlurmdLogFile={base}/slurmd.%n.log
SlurmdSpoolDir={base}/spool/%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=16
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0,sched_min_interval=0,requeue_delay=1
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=20
KillWait=30
OverTimeLimit=0
InactiveLimit=0
MinJobAge=600
JobRequeue=1
MailProg=/bin/true
GresTypes=gpu
"""


def missing() -> str:
    """Return why no SLURM can be started here, or nothing."""
    absent = [
        name for name in (*_DAEMONS, "sbatch") if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None
    ]
    if absent:
        return f"{', '.join(absent)} not found: apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "a private SLURM has to be started as root"


class OneMachine:
    """The daemons, which `start` starts and `stop` ends; each by its own process id."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.conf = base / "slurm.conf"
        self.env = {**os.environ, "SLURM_CONF": str(self.conf), "PATH": f"{os.environ['PATH']}:/usr/sbin"}

    def start(self) -> None:
        """Start everything and wait until all nodes are idle."""
        for name in ("state", "dev", *(f"spool/{node}" for node in (*TRAINERS, *CPU_NODES))):
            (self.base / name).mkdir(parents=True)
        self._write_files()
        munge = [f"--{name}={self.base}/munge{end}" for name, end in _MUNGE.items()]
        self._run("munged", "--force", "--num-threads=2", *munge)
        self.start_controller("-c")
        for node in (*TRAINERS, *CPU_NODES):
            self.start_node(node)
        self.wait_idle((*TRAINERS, *CPU_NODES))

    def stop(self) -> None:
        """End all jobs and daemons, and whatever they left."""
        subprocess.run(["scancel", "--user=root"], env=self.env, capture_output=True, check=False, timeout=30)
        end = time.monotonic() + 10
        while self._squeue() and time.monotonic() < end:
            time.sleep(0.2)
        for path in [*self.base.glob("slurmd.*.pid"), self.base / "slurmctld.pid", self.base / "munge.pid"]:
            if (pid := _pid(path)) is not None:
                psutil.Process(pid).send_signal(signal.SIGTERM)
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def processes(self) -> list[psutil.Process]:
        """Processes of this cluster: their environment names its configuration, or their words its directory."""
        found = []
        for process in psutil.process_iter():
            try:
                words = " ".join(process.cmdline())
                ours = process.environ().get("SLURM_CONF") == str(self.conf) or str(self.base) in words
            except psutil.Error:
                continue
            if ours and process.pid != os.getpid() and process.pid not in _ancestors():
                found.append(process)
        return found

    def start_controller(self, *words: str) -> None:
        """Start slurmctld, which goes on with the jobs that it had."""
        self._run("slurmctld", *words)

    def stop_controller(self) -> None:
        """End slurmctld, which keeps on file what it knows; nodes and jobs go on."""
        pid = _pid(self.base / "slurmctld.pid")
        assert pid is not None
        process = psutil.Process(pid)
        process.terminate()
        process.wait(20)

    def start_node(self, node: str) -> None:
        """Start a node's slurmd."""
        self._run("slurmd", "-N", node)

    def kill_slurmd(self, node: str) -> None:
        """Kill a node's slurmd; its jobs go on for now."""
        pid = _pid(self.base / f"slurmd.{node}.pid")
        assert pid is not None
        psutil.Process(pid).kill()

    def kill_node(self, node: str) -> None:
        """Kill all that a node runs, at once: slurmd, the stewards of its steps, their processes."""
        tasks = [process for process in self.processes() if _variable(process, "SLURMD_NODENAME") == node]
        stewards = {parent for task in tasks for parent in task.parents() if parent.name().startswith("slurmstepd")}
        self.kill_slurmd(node)
        for process in (*stewards, *tasks):  # in this order nobody tells of another's end
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def wait_idle(self, nodes: Sequence[str], within_s: float = 30) -> None:
        """Wait until nodes have nothing to do."""
        end = time.monotonic() + within_s
        command = ["sinfo", "--noheader", "--Node", "--states=idle", "--format=%N", "--responding"]
        while True:
            idle = subprocess.run(command, env=self.env, capture_output=True, text=True, check=False).stdout.split()
            if set(nodes) <= set(idle):
                return
            assert time.monotonic() < end, f"idle are only {idle}"
            time.sleep(0.1)

    def _write_files(self) -> None:
        key = self.base / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        for number in range(GPUS):
            os.mknod(self.base / "dev" / f"gpu{number}", 0o20666, os.makedev(1, 3))  # /dev/null
        (self.base / "gres.conf").write_text(
            f"NodeName={','.join(TRAINERS)} Name=gpu File={self.base}/dev/gpu[0-{GPUS - 1}]\n"
        )
        host, ports = socket.gethostname().partition(".")[0], _free_ports(1 + len(TRAINERS + CPU_NODES))
        lines = [_CONF.format(host=host, port=ports[0], base=self.base)]
        for node, port in zip((*TRAINERS, *CPU_NODES), ports[1:], strict=True):
            gres = f" Gres=gpu:{GPUS}" if node in TRAINERS else ""
            lines.append(
                f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} "
                f"CPUs={CPUS} RealMemory=4096{gres}\n"
            )
        lines.append(f"PartitionName=ci Nodes={','.join(TRAINERS)} Default=YES MaxTime=INFINITE State=UP\n")
        lines.append(f"PartitionName=cpu Nodes={','.join(CPU_NODES)} MaxTime=INFINITE State=UP\n")
        self.conf.write_text("".join(lines))

    def _run(self, *command: str) -> None:
        subprocess.run(command, env=self.env, check=True, timeout=30, stdin=subprocess.DEVNULL)

    def _squeue(self) -> str:
        command = ["squeue", "--noheader"]
        return subprocess.run(command, env=self.env, capture_output=True, text=True, check=False).stdout


_MUNGE = {"key-file": ".key", "socket": ".socket", "pid-file": ".pid", "log-file": ".log", "seed-file": ".seed"}


def _pid(path: Path) -> int | None:
    text = path.read_text().strip() if path.exists() else ""
    return int(text) if text and psutil.pid_exists(int(text)) else None


def _variable(process: psutil.Process, name: str) -> str | None:
    try:
        return process.environ().get(name)
    except psutil.Error:
        return None


def _ancestors() -> set[int]:
    return {process.pid for process in psutil.Process().parents()}


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports
