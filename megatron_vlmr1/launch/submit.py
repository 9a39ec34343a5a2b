"""A run as SLURM jobs: checked, frozen into its run directory, written as one sbatch script, submitted."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_vlmr1 import config
from megatron_vlmr1.launch import slurm, snapshot
from megatron_vlmr1.launch.cluster import check_warning, time_text
from megatron_vlmr1.launch.script import BAD_NODES, Request, bad_nodes, render
from megatron_vlmr1.rewards import tasks
from megatron_vlmr1.runtime import lock
from megatron_vlmr1.train.check import check_data, check_inputs

__all__ = ["Request", "check", "script", "submit"]

logger = logging.getLogger(__name__)


def submit(request: Request) -> list[str]:
    """Check, freeze and submit a run; return the ids of its jobs, one for each link of the chain.

    Raises:
        ValueError: the request does not fit together, SLURM is not here or refuses it, or the run directory cannot be
            written; one line, nothing submitted.
    """
    check(request)
    check_data(request.cfg)
    slurm.check_installed()
    try:
        return _submit_snapshot(request)
    except OSError as error:
        where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        raise ValueError(f"{where}{error.strerror or error}") from error


def _submit_snapshot(request: Request) -> list[str]:
    request = _with_service(request)
    path = snapshot.next_path(request.run_dir)
    text = render(request, path)
    with lock.held(request.run_dir):
        pass  # to be told at once; rank 0 holds it while it runs
    if nodes := bad_nodes(request.run_dir):
        logger.warning("without %s, as %s says", ", ".join(nodes), request.run_dir / BAD_NODES)
    (request.run_dir / "logs").mkdir(exist_ok=True)
    snapshot.write(path, config.dump(request.cfg), text, _facts(request), tasks.files(request.cfg.task))
    try:
        return _submit_chain(path / snapshot.SCRIPT, request.chain)
    except BaseException:  # Ctrl-C too: without its snapshot a job that SLURM has taken all the same ends at once
        shutil.rmtree(path)
        raise


def script(request: Request) -> str:
    """Return the script that `submit` would submit; writes nothing.

    Raises:
        ValueError: the request does not fit together.
    """
    check(request)
    return render(_with_service(request, make_keys=False), snapshot.next_path(request.run_dir))


def check(request: Request) -> None:
    """Check what can be checked without the data.

    Raises:
        ValueError: one line that names the option, key, file or directory.
    """
    for name, value in (("--nodes", request.nodes), ("--chain", request.chain)):
        if value < 1:
            raise ValueError(f"{name} {value}: at least 1")
    if request.rewards_nodes not in (0, 1):
        raise ValueError(f"--rewards-nodes {request.rewards_nodes}: 0, or 1 for one service that all ranks ask")
    if request.rewards_nodes and request.cfg.rewards.address is not None:
        raise ValueError("rewards.address names a service already: leave it out, or --rewards-nodes")
    if request.time is not None:
        try:
            check_warning(time_text(request.time), request.cluster.signal_s)
        except ValueError as error:
            raise ValueError(f"--time {error}") from error
    check_inputs(request.cfg, request.world)


def _with_service(request: Request, make_keys: bool = True) -> Request:
    """Return the request with a config that knows the keys and the size of the reward service, if it has its own."""
    if not request.rewards_nodes:
        return request
    if make_keys and not request.keys.exists():
        from megatron_vlmr1.rewards import keys

        request.run_dir.mkdir(parents=True, exist_ok=True)
        keys.create(request.keys)
    known = {"keys": str(request.keys), "workers": request.cluster.reward_cpus}
    rewards = request.cfg.rewards.model_copy(update=known)
    return replace(request, cfg=request.cfg.model_copy(update={"rewards": rewards}))


def _submit_chain(path: Path, links: int) -> list[str]:
    jobs: list[str] = []
    try:
        for _ in range(links):
            jobs.append(slurm.sbatch(path, after=jobs[-1] if jobs else None))
    except BaseException:
        _cancel(jobs)
        raise
    return jobs


def _cancel(jobs: Sequence[str]) -> None:
    for job in jobs:
        try:
            slurm.cancel(job)
        except ValueError as error:
            logger.warning("job %s is still in the queue, where it will fail: %s", job, error)


def _facts(request: Request) -> dict[str, object]:
    return {
        "nodes": request.nodes,
        "ranks": request.world,
        "chain": request.chain,
        "rewards_nodes": request.rewards_nodes,
        "cluster": request.cluster.model_dump(mode="json"),
    }
