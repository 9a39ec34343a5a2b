"""Which versions this node runs, and whether they are those that setup.cfg asks for."""

from __future__ import annotations

import hashlib
import platform
from functools import cache
from importlib import metadata
from pathlib import Path

from megatron_vlmr1.telemetry import nvml

DISTRIBUTION = "megatron-vlmr1"
# What a job's nodes must agree on; what is not installed is "".
_PACKAGES = ("torch", "megatron-core", "transformers", "transformer-engine", "numpy", "safetensors")
DRIVER = "GPU driver"  # may differ


def installed(name: str) -> str:
    """Return a distribution's version, "" where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def versions() -> dict[str, str]:
    """Return what must be the same on all nodes of a job, by name."""
    import torch

    return {
        "Python": platform.python_version(),
        "code of megatron_vlmr1": code_sha256()[:12],
        **{name: installed(name) for name in _PACKAGES},
        "CUDA": torch.version.cuda or "",
        "NCCL": nccl_version(),
        DRIVER: nvml.driver_version(),
    }


def nccl_version() -> str:
    """Return the version of NCCL that torch has, "" without one."""
    import torch
    import torch.distributed as dist

    if not torch.cuda.is_available() or not dist.is_nccl_available():
        return ""
    return ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]


@cache
def code_sha256() -> str:
    """Return the sha256 of this package's Python files."""
    top = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(top.rglob("*.py")):
        digest.update(f"{path.relative_to(top)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()
