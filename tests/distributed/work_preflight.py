"""What ranks do in tests of the preflight: pretend to be nodes, one of which is bad."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from megatron_vlmr1.config import Config
from megatron_vlmr1.errors import RunStopped
from megatron_vlmr1.launch import preflight, preflight_network, preflight_node
from megatron_vlmr1.launch.versions import DRIVER
from megatron_vlmr1.runtime import clocks, device, distributed
from megatron_vlmr1.telemetry import nvml
from tests.fake_nvml import FakeNvml

# Of every large message on a slow link: those of the test take about a millisecond, and ten where the machine is busy.
LATE_S = 0.05


def config(level: str, seed: int = 0) -> Config:
    sections = {"model": {"path": "asset:tiny_vlm"}, "data": {"train": "x"}, "launch": {"preflight": level}}
    return Config.model_validate({**sections, "seed": seed})


def everything(directory: Path) -> None:
    """Every case on four nodes of one rank, and on two nodes of two; what each rank saw goes to a file."""
    rank = dist.get_rank()
    preflight._SEEN_S, preflight._PAUSE_S = 0.5, 0.1
    seen: dict[str, Any] = {}
    for name, (level, fault, environment) in CASES.items():
        log_dir = directory / name / "logs" / "attempt_0"
        log_dir.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        nodes = {"SLURMD_NODENAME": f"n{rank}", "LOCAL_RANK": "0"}
        if name.startswith("pairs_of_ranks"):
            nodes = {"SLURMD_NODENAME": f"n{rank // 2}", "LOCAL_RANK": str(rank % 2)}
        with mock.patch.dict(os.environ, {**nodes, **environment}), fault(rank):
            seen[name] = ending(level, log_dir, rank)
    seen["cuda_lost"] = [None, ""]
    lost = {"SLURMD_NODENAME": f"n{rank // 2}"}
    with mock.patch.dict(os.environ, lost), mock.patch.object(device, "has_cuda", lambda: rank not in (2, 3)):
        try:
            distributed._check_same_devices()
        except ValueError as error:
            seen["cuda_lost"] = [2, str(error)]
    (directory / f"rank_{rank}.json").write_text(json.dumps(seen))


def ending(level: str, log_dir: Path, rank: int) -> list[Any]:
    """How the preflight ended here: [exit code or None, words]."""
    cfg = config(level, seed=int(log_dir.parts[-3] == "other_config" and rank == 1))
    if log_dir.parts[-3] == "not_shared" and rank == 3:
        log_dir = log_dir.with_name("elsewhere")
        log_dir.mkdir(exist_ok=True)
    try:
        preflight.preflight(cfg, log_dir)
    except RunStopped as stopped:
        return [stopped.code, str(stopped)]
    except ValueError as error:
        return [2, str(error)]
    return [None, ""]


@contextmanager
def nothing(rank: int) -> Iterator[None]:
    yield


def on(*ranks: int, patch: Callable[[int], Any]) -> Callable[[int], Any]:
    """Apply `patch(rank)` on these ranks only."""

    @contextmanager
    def applied(rank: int) -> Iterator[None]:
        with ExitStack() as stack:
            if rank in ranks:
                stack.enter_context(patch(rank))
            yield

    return applied


def other_version(name: str) -> Callable[[int], Any]:
    real = preflight_node.versions()
    return lambda rank: mock.patch.object(preflight_node, "versions", lambda: {**real, name: "9.9"})


def late_link(*links: set[int]) -> Callable[[int], Any]:
    """Large messages between two ranks of a set in `links` are late."""
    real = preflight_network._meet

    def patch(rank: int) -> Any:
        def meet(tensor: Any, peer: int) -> Any:
            if {rank, peer} in links and tensor.numel() > 1:
                time.sleep(LATE_S)
            return real(tensor, peer)

        return mock.patch.object(preflight_network, "_meet", meet)

    return patch


def changed_messages(rank: int) -> Any:
    real = preflight_network._meet
    return mock.patch.object(preflight_network, "_meet", lambda tensor, peer: real(tensor + 0.5, peer))


def little_room(rank: int) -> Any:
    return mock.patch.object(shutil, "disk_usage", lambda path: mock.Mock(free=7 << 20))


def other_clock(rank: int) -> Any:
    return mock.patch.object(clocks, "now", lambda: time.time() + 60)


@contextmanager
def gpus(rank: int, **sick: Any) -> Iterator[None]:
    """A GPU for every rank, where rank 1 has a sick one."""
    fake = FakeNvml(*[sick if r == 1 and sick else {} for r in range(4)])
    with (
        mock.patch.object(nvml, "library", lambda: fake),
        mock.patch.object(device, "uuid", lambda: f"GPU-{rank}"),
    ):
        yield


def gpu_speed(rank: int) -> Any:
    return mock.patch.object(preflight_node, "gemm_tflops", lambda: 300.0 if rank == 2 else 700.0)


ALL = (0, 1, 2, 3)
SLURM = {"SLURM_JOB_ID": "7"}
FROM_2 = ({0, 2}, {1, 2}, {2, 3})
CASES: dict[str, tuple[str, Callable[[int], Any], dict[str, str]]] = {
    "clean": ("full", nothing, {}),
    "clean_quick": ("quick", nothing, SLURM),
    "pairs_of_ranks": ("full", nothing, {}),
    "off": ("off", on(2, patch=little_room), {}),
    "version": ("quick", on(2, patch=other_version("torch")), SLURM),
    "other_config": ("quick", nothing, SLURM),
    "driver": ("quick", on(2, patch=other_version(DRIVER)), SLURM),
    "not_shared": ("quick", nothing, SLURM),
    "slow_node": ("full", on(*ALL, patch=late_link(*FROM_2)), SLURM),
    "slow_node_quick": ("quick", on(*ALL, patch=late_link(*FROM_2)), SLURM),
    "slow_link": ("full", on(*ALL, patch=late_link({0, 1})), SLURM),
    "changed": ("full", on(3, patch=changed_messages), SLURM),
    "disk": ("quick", on(1, patch=little_room), SLURM),
    "disk_without_slurm": ("quick", on(1, patch=little_room), {}),
    "disk_everywhere": ("quick", on(*ALL, patch=little_room), SLURM),
    "clock": ("quick", on(3, patch=other_clock), SLURM),
    "clock_of_rank_0": ("quick", on(0, patch=other_clock), SLURM),
    "gpus_well": ("quick", lambda rank: gpus(rank), SLURM),
    "gpu_ecc": ("quick", lambda rank: gpus(rank, uncorrected=3), SLURM),
    "gpu_full": ("quick", lambda rank: gpus(rank, used=70 << 30), SLURM),
    "gpu_slow": ("quick", on(*ALL, patch=gpu_speed), SLURM),
}
