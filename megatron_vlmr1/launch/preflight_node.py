"""What each rank finds out about itself and its node, without the others."""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from megatron_vlmr1.config import TelemetryConfig
from megatron_vlmr1.launch.disk import Disk, existing_parent, measure
from megatron_vlmr1.launch.health import SLOW_DISK_BYTES_S, port_problem
from megatron_vlmr1.launch.versions import versions
from megatron_vlmr1.runtime import attempts, device
from megatron_vlmr1.runtime.ranks import leads_node, node_name
from megatron_vlmr1.telemetry import nvml

WRITE_BYTES = {"quick": 4 << 20, "full": 64 << 20}
_GEMM = 8192  # rows and columns; 1.1 TFLOP, about 2 ms on an H100
_GEMM_S = 0.15  # of products, for clocks to settle
_AT_ONCE = 4  # products that are waited for together
_AGAIN, _PAUSE_S = 2, 0.3  # measurements of a slow disk after the first, and between them


@dataclass(frozen=True)
class RankFacts:
    """What one rank knows; the first of a node speaks for it.

    Attributes:
        versions: by name; of the node's first rank, else empty.
        config: sha256 of the config, "" without one.
        disks: of the node's first rank.
        gpu: this rank's own, None on a CPU.
        gemm_tflops: bf16 matrix products on this rank's GPU; 0 on a CPU.
        free_bytes: memory that is available on the node.
        total_bytes: memory of the node.
        port: what is wrong with the port that is to be served, on the rank that serves it.
    """

    rank: int
    node: str
    config: str
    versions: dict[str, str] = field(default_factory=dict)
    disks: tuple[Disk, ...] = ()
    gpu: nvml.Health | None = None
    gemm_tflops: float = 0.0
    free_bytes: int = 0
    total_bytes: int = 0
    port: str = ""


def facts(
    rank: int, config: str, directory: Path, cache_dir: str | None, level: str, telemetry: TelemetryConfig | None
) -> RankFacts:
    """Find out: in `directory`, in the node's temporary files and in `cache_dir` something is written.

    A port that is taken is a user's mistake at a run's first attempt; a later one had better go on without it.
    """
    speed = gemm_tflops()
    uuid = device.uuid()
    gpu = next(iter(nvml.read_health(uuid)), None) if uuid else None  # right after work: an idle one is not slowed down
    if not leads_node():
        return RankFacts(rank, node_name(), config, gpu=gpu, gemm_tflops=speed)
    memory = psutil.virtual_memory()
    places = [directory, Path(tempfile.gettempdir()), *([existing_parent(Path(cache_dir))] if cache_dir else [])]
    return RankFacts(
        rank,
        node_name(),
        config,
        versions(),
        tuple(_measured(place, WRITE_BYTES[level]) for place in dict.fromkeys(places)),
        gpu,
        speed,
        memory.available,
        memory.total,
        port_problem(telemetry.prometheus_host, telemetry.prometheus_port)
        if rank == 0 and telemetry and not attempts.number(directory)
        else "",
    )


def _measured(place: Path, size_bytes: int) -> Disk:
    """Measure again while a disk is slow, and keep the best: all nodes write at the same time."""
    found = measure(place, size_bytes)
    for _ in range(_AGAIN):
        if found.problem or found.write_bytes_s >= SLOW_DISK_BYTES_S:
            break
        time.sleep(_PAUSE_S)
        again = measure(place, size_bytes)
        found = again if again.problem else max(found, again, key=lambda disk: disk.write_bytes_s)
    return found


def gemm_tflops() -> float:
    """Return TFLOP/s of bf16 matrix products on this rank's GPU; 0 without one, or where it has no memory left."""
    if not device.has_cuda():
        return 0.0
    try:
        seconds = _products_s()
    except torch.OutOfMemoryError:  # NVML tells how much is free, and who holds the rest
        return 0.0
    finally:
        torch.cuda.empty_cache()
    return 2 * _GEMM**3 * _AT_ONCE / seconds / 1e12


def _products_s() -> float:
    """Seconds of `_AT_ONCE` products: the median, since a process that is held up for a moment has no slow GPU."""
    a = torch.ones(_GEMM, _GEMM, dtype=torch.bfloat16, device=device.device())
    out = a @ a
    torch.cuda.synchronize()
    rounds: list[float] = []
    while sum(rounds) < _GEMM_S:
        begun = time.perf_counter()
        for _ in range(_AT_ONCE):
            torch.matmul(a, a, out=out)
        torch.cuda.synchronize()
        rounds.append(time.perf_counter() - begun)
    return statistics.median(rounds)
