"""Functions of tests on several gloo ranks, or in this process alone."""

from __future__ import annotations

import faulthandler
import importlib
import json
import multiprocessing
import multiprocessing.connection
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_vlmr1.config import ParallelConfig
from megatron_vlmr1.launch.local import ORDERLY_GRACE_S, log_path
from megatron_vlmr1.runtime import device, distributed
from megatron_vlmr1.runtime.children import die_with_parent

TIMEOUT_S = 60
LAYOUTS = {
    "one": ParallelConfig(),
    "tp2": ParallelConfig(tensor_model_parallel_size=2),
    "pp2": ParallelConfig(pipeline_model_parallel_size=2),
    "pp2_uneven": ParallelConfig(pipeline_model_parallel_size=2, pipeline_layers=[1, 3]),
    "pp2_vp2": ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
    "tp2_sp": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
    "dp2": ParallelConfig(),
    "tp2_pp2": ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
    "tp4": ParallelConfig(tensor_model_parallel_size=4),
    "pp4": ParallelConfig(pipeline_model_parallel_size=4),
    "tp2_pp2_vp2": ParallelConfig(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
        pipeline_layers=[1, 3, 2, 2],
        sequence_parallel=True,
    ),
    "pp4_vp2": ParallelConfig(pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=2),
    "dp2_pp2": ParallelConfig(pipeline_model_parallel_size=2, pipeline_layers=[5, 3]),
}
TWO_RANKS = ("tp2", "pp2", "pp2_uneven", "pp2_vp2", "tp2_sp", "dp2")
REPLAYED = ("tp2", "pp2", "pp2_vp2", "dp2")  # take ten steps


def run(nproc: int, function: Callable[..., None], directory: Path, **arguments: Any) -> None:
    """Call `function(directory, **arguments)` on `nproc` ranks; the arguments go through JSON."""
    name = f"{function.__module__}:{function.__name__}"
    logs = directory / f"logs_{function.__name__}"
    logs.mkdir(exist_ok=True)
    codes = fork(nproc, be_rank, (name, str(directory), json.dumps(arguments)), logs)
    tails = {rank: log_path(logs, rank).read_text()[-3000:] for rank in range(nproc)}
    assert set(codes) == {0}, "\n".join([f"{name}: {codes}", *(f"--- rank {r}\n{tail}" for r, tail in tails.items())])


def fork(nproc: int, work: Callable[..., None], arguments: Sequence[Any], logs: Path) -> list[int]:
    """Call `work(*arguments)` on `nproc` ranks, forked from a process that has imported what all of them need.

    Their output goes to `logs`. Returns their exit codes; soon after one has failed, the others are killed.
    """
    shared = {"WORLD_SIZE": str(nproc), "LOCAL_WORLD_SIZE": str(nproc), "MASTER_ADDR": "127.0.0.1"}
    shared["VLMR1_INIT_METHOD"] = (logs / f"rendezvous_{time.time_ns()}").as_uri()
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.distributed.preloaded"])
    processes = []
    for rank in range(nproc):
        environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(server.Process(target=_be, args=(work, arguments, environment, str(log_path(logs, rank)))))
        processes[-1].start()
    return _wait(processes)


def _wait(processes: list[Any]) -> list[int]:
    """Wait for all, or kill the others soon after one has failed."""
    waiting = list(processes)
    while waiting:
        sentinels = {process.sentinel: process for process in waiting}
        for sentinel in multiprocessing.connection.wait(sentinels):
            process = sentinels[sentinel]
            process.join()
            waiting.remove(process)
            if process.exitcode != 0:
                for other in waiting:
                    other.join(ORDERLY_GRACE_S)
                    other.kill()
    return [process.exitcode for process in processes]


def _be(work: Callable[..., None], arguments: Sequence[Any], variables: dict[str, str], log: str) -> None:
    """Be a process that was forked from one with all imports."""
    die_with_parent()
    os.environ.update(variables)
    with open(log, "wb") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)
    faulthandler.enable()
    work(*arguments)


def be_rank(name: str, directory: str, arguments: str) -> None:
    """Join the other ranks and call the function of that name."""
    device.prepare_megatron()
    distributed.start(TIMEOUT_S)
    module, _, function = name.partition(":")
    getattr(importlib.import_module(module), function)(Path(directory), **json.loads(arguments))
    distributed.stop()


@contextmanager
def layout(wanted: str | ParallelConfig) -> Iterator[Any]:
    """Lay the joined ranks out as `wanted` says, one of `LAYOUTS` or another; forget the groups afterwards."""
    from megatron_vlmr1.parallel import mesh
    from megatron_vlmr1.runtime import seeds

    try:
        built = mesh.build(LAYOUTS[wanted] if isinstance(wanted, str) else wanted)
        seeds.seed_everything(0)
        yield built
    finally:
        mesh.destroy()


@contextmanager
def alone() -> Iterator[Any]:
    """Make a mesh of this process alone."""
    device.prepare_megatron()
    distributed.start(TIMEOUT_S)
    try:
        with layout("one") as mesh:
            yield mesh
    finally:
        distributed.stop()
