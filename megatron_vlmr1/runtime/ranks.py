"""Who this process is in the job, from its environment: srun, torchrun or our launcher. No torch."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass


@dataclass(frozen=True)
class Identity:
    """This process's place among the job's ranks."""

    rank: int
    world: int
    local_rank: int


def identity() -> Identity | None:
    """Return this process's place when it was started as a rank, else None."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return Identity(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", "0")))
    # Only srun sets the step's variables; the batch script itself is no rank. One task may be somebody's shell, but not
    # where our batch script has said where the logs go.
    tasks = int(env.get("SLURM_STEP_NUM_TASKS", "0"))
    if "SLURM_PROCID" in env and (tasks > 1 or (tasks == 1 and "VLMR1_LOG_DIR" in env)):
        return Identity(int(env["SLURM_PROCID"]), tasks, int(env.get("SLURM_LOCALID", "0")))
    return None


def node_name() -> str:
    """Return this node's name as SLURM knows it, else its host name: several SLURM nodes may be one host."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def leads_node() -> bool:
    """Whether this process is its node's first rank, or no rank at all."""
    me = identity()
    return me is None or me.local_rank == 0
