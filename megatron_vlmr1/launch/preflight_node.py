"""What each rank finds out about itself and its node, without the others."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from megatron_vlmr1.config import TelemetryConfig
from megatron_vlmr1.launch.disk import Disk, existing_parent, measure
from megatron_vlmr1.launch.health import port_problem
from megatron_vlmr1.launch.versions import versions
from megatron_vlmr1.runtime import device
from megatron_vlmr1.runtime.ranks import leads_node, node_name
from megatron_vlmr1.telemetry import nvml

WRITE_BYTES = {"quick": 4 << 20, "full": 64 << 20}
_GEMM = 8192  # rows and columns; 1.1 TFLOP, about 2 ms on an H100
_GEMM_S = 0.15  # of products, for clocks to settle


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
    """Find out: in `directory`, in the node's temporary files and in `cache_dir` something is written."""
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
        tuple(measure(place, WRITE_BYTES[level]) for place in dict.fromkeys(places)),
        gpu,
        speed,
        memory.available,
        memory.total,
        port_problem(telemetry.prometheus_host, telemetry.prometheus_port) if rank == 0 and telemetry else "",
    )


def gemm_tflops() -> float:
    """Return TFLOP/s of bf16 matrix products on this rank's GPU, 0 without one."""
    if not device.has_cuda():
        return 0.0
    a = torch.ones(_GEMM, _GEMM, dtype=torch.bfloat16, device=device.device())
    _ = a @ a
    torch.cuda.synchronize()
    count, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < _GEMM_S:
        for _i in range(4):
            _ = a @ a
        torch.cuda.synchronize()
        count += 4
    seconds = time.perf_counter() - begun
    del a, _
    torch.cuda.empty_cache()
    return 2 * _GEMM**3 * count / seconds / 1e12
