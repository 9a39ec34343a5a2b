"""Disks, memory, limits, cores, ports and names of this machine."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import tempfile
from pathlib import Path

import psutil

from megatron_vlmr1.launch.disk import existing_parent, measure
from megatron_vlmr1.launch.doctor_line import Line
from megatron_vlmr1.launch.health import MIN_DISK_BYTES, MIN_MEMORY_BYTES, port_problem
from megatron_vlmr1.telemetry import nvml

SHM_BYTES = 1 << 30  # NCCL and gloo of a node's ranks meet there
OPEN_FILES = 1024
_WRITE_BYTES = 64 << 20
_MASTER_PORT = "29500"  # torchrun's own, where MASTER_PORT is not set
# Of cgroups 2 and 1; the root's own file is not there.
_CGROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def lines(run_dir: Path) -> list[Line]:
    """Look at the host; `run_dir` need not exist."""
    return [
        disk_line("run directory", run_dir),
        disk_line("temporary files", Path(tempfile.gettempdir())),
        _shm(Path("/dev/shm")),  # noqa: S108 - its size is looked at
        _memory(),
        _limit("open files (ulimit -n)", resource.RLIMIT_NOFILE, OPEN_FILES),
        _limit("locked memory (ulimit -l)", resource.RLIMIT_MEMLOCK, None if nvml.library() else 0),
        _cores(),
        _master_port(os.environ.get("MASTER_PORT") or _MASTER_PORT),
        _name(),
    ]


def disk_line(name: str, path: Path) -> Line:
    """Look at room and speed of a directory, or of the nearest one above it that exists."""
    found = measure(existing_parent(path), _WRITE_BYTES)
    if found.problem:
        return Line(name, "bad", f"{found.path}: {found.problem}", "name another directory, or make it writable")
    said = f"{found.path}: {_gb(found.free_bytes)} free, writes {found.write_bytes_s / 1e6:.0f} MB/s"
    if found.free_bytes < MIN_DISK_BYTES:
        return Line(name, "bad", said, "make room, or name another directory")
    return Line(name, "ok", said)


def port_line(host: str, port: int, setting: str = "telemetry.prometheus_port") -> Line:
    """Look whether a port can be had."""
    if problem := port_problem(host, port):
        return Line(f"port {port}", "missing", problem.replace("telemetry.prometheus_port", setting), f"set {setting}")
    return Line(f"port {port}", "ok", f"free at {host}")


def _master_port(text: str) -> Line:
    if not text.isdecimal() or int(text) > 65535:
        return Line("MASTER_PORT", "bad", f"{text!r} is no port", "set it to a number below 65536, or unset it")
    return port_line("127.0.0.1", int(text), "MASTER_PORT")


def cgroup_limit() -> int | None:
    """Return the bytes that this container or job may hold; None without a limit."""
    for path in _CGROUPS:
        try:
            text = path.read_text().strip()
        except OSError:
            continue
        return int(text) if text.isdecimal() and int(text) < psutil.virtual_memory().total else None
    return None


def _shm(path: Path) -> Line:
    try:
        size = shutil.disk_usage(path).total
    except OSError as error:
        return Line(str(path), "missing", error.strerror or str(error), "mount a tmpfs there")
    if size < SHM_BYTES:
        return Line(str(path), "missing", f"only {_gb(size)}", "give the container more: --shm-size=8g, --ipc=host")
    return Line(str(path), "ok", _gb(size))


def _memory() -> Line:
    memory, limit = psutil.virtual_memory(), cgroup_limit()
    bound = f", at most {_gb(limit)} in this container or job" if limit else ""
    said = f"{_gb(memory.available)} of {_gb(memory.total)} available{bound}"
    if min(memory.available, limit or memory.available) < MIN_MEMORY_BYTES:
        return Line("memory", "bad", said, "end what takes it")
    return Line("memory", "ok", said)


def _limit(name: str, kind: int, wanted: int | None) -> Line:
    """A limit that should be `wanted` at least; None means that it should be none."""
    soft, _ = resource.getrlimit(kind)
    said = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft:,}"
    enough = soft == resource.RLIM_INFINITY or (wanted is not None and soft >= wanted)
    do = f"raise it to {wanted or 'unlimited'} (limits.conf, or LimitNOFILE and LimitMEMLOCK of slurmd)"
    return Line(name, "ok" if enough else "missing", said, "" if enough else do)


def _cores() -> Line:
    mine, all_ = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    return Line("cores", "ok", f"this process may use {mine} of {all_}")


def _name() -> Line:
    name = socket.gethostname()
    try:
        return Line("host name", "ok", f"{name} is {socket.gethostbyname(name)}")
    except OSError as error:
        do = "name the interface in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, or add the name to /etc/hosts"
        return Line("host name", "missing", f"{name}: {error.strerror or error}", do)


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
