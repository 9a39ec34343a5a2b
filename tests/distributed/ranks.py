"""Functions of tests on several gloo ranks, or in this process alone.

As a program: one rank of such a job.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_vlmr1.config import ParallelConfig
from megatron_vlmr1.launch.local import log_path, run_ranks
from megatron_vlmr1.runtime import device, distributed

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
    command = [sys.executable, "-m", "tests.distributed.ranks", name, str(directory), json.dumps(arguments)]
    logs = directory / f"logs_{function.__name__}"
    code = run_ranks(nproc, command, logs, {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})
    tails = {rank: log_path(logs, rank).read_text()[-3000:] for rank in range(nproc)}
    assert code == 0, "\n".join([f"{name}: exit code {code}", *(f"--- rank {r}\n{tail}" for r, tail in tails.items())])


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


def main() -> None:
    """Be one rank."""
    name, directory, arguments = sys.argv[1:]
    device.prepare_megatron()
    distributed.start(TIMEOUT_S)
    module, _, function = name.partition(":")
    getattr(importlib.import_module(module), function)(Path(directory), **json.loads(arguments))
    distributed.stop()


if __name__ == "__main__":
    main()
