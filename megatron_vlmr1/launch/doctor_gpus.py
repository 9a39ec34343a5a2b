"""The GPUs of this machine as NVML shows them."""

from __future__ import annotations

from megatron_vlmr1.launch.doctor_line import Line
from megatron_vlmr1.launch.health import gpu_reasons
from megatron_vlmr1.telemetry import nvml

_DO = "use another GPU; `nvidia-smi -q` tells more, a reset or reboot may mend it"


def lines() -> list[Line]:
    """Look at every GPU: errors, replaced rows, throttling, clocks, free memory, other processes."""
    found = nvml.read_health()
    if not found:
        why = "no NVML: neither GPU nor driver" if nvml.library() is None else "NVML shows none"
        return [Line("GPUs", "missing", why, "nothing, to train on the CPU")]
    return [_line(gpu) for gpu in found]


def _line(gpu: nvml.Health) -> Line:
    if reasons := gpu_reasons(gpu):
        return Line(f"GPU {gpu.index}", "bad", ", ".join(reasons), _DO)
    others = f", {len(gpu.processes)} processes on it" if gpu.processes else ""
    memory = f"{gpu.mem_free / 1e9:.1f} of {gpu.mem_total / 1e9:.1f} GB free"
    return Line(f"GPU {gpu.index}", "ok", f"{gpu.name}, {memory}, {gpu.sm_mhz} of {gpu.sm_max_mhz} MHz{others}")
