"""What counts as sick on one node, for the doctor and the preflight alike."""

from __future__ import annotations

import socket

from megatron_vlmr1.telemetry.nvml import Health

MIN_DISK_BYTES = 256 << 20  # free where a run writes; checkpoints that find no room are told of and tried again
MIN_MEMORY_BYTES = 256 << 20  # available on a node
SLOW_DISK_BYTES_S = 20e6  # a disk that writes as much is no slow one, whatever others do
MIN_GPU_FREE = 0.85  # of its memory, before a model is loaded; CUDA and NCCL hold some already


def gpu_reasons(gpu: Health) -> list[str]:
    """Return what is wrong with a GPU, in words."""
    if gpu.lost:
        return [f"does not answer: {gpu.lost}"]
    found = [f"is slowed down ({reason})" for reason in gpu.throttled]
    if gpu.ecc_uncorrected:
        found.append(f"has {gpu.ecc_uncorrected} uncorrected memory errors")
    if gpu.row_trouble:
        found.append(gpu.row_trouble)
    if gpu.mem_total and gpu.mem_free < MIN_GPU_FREE * gpu.mem_total:
        by = f" (processes {', '.join(map(str, gpu.processes))})" if gpu.processes else ""
        found.append(f"has {gigabytes(gpu.mem_free)} of {gigabytes(gpu.mem_total)} free{by}")
    return found


def port_problem(host: str, port: int | None) -> str:
    """Return why nothing can be served there, "" if it can or nothing shall."""
    if not port:
        return ""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, TypeError) as error:  # the latter of a host that is no name
            return f"telemetry.prometheus_port={port} cannot be had at {host}: {getattr(error, 'strerror', error)}"
    return ""


def gigabytes(count: float) -> str:
    """Return bytes as "1.50 GB"."""
    return f"{count / 1e9:.2f} GB"
