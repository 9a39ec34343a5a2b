"""A run as a SLURM job: checked, frozen into its run directory, written as one sbatch script, submitted."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vlmr1.config import Config
from megatron_vlmr1.launch.cluster import Cluster


@dataclass(frozen=True)
class Request:
    """What is to be run, and where.

    Attributes:
        cfg: the run's resolved config; paths in it are relative to the working directory, which the job keeps.
        cluster: facts of the cluster.
        nodes: of the training; each has `cluster.ranks_per_node` ranks.
        chain: jobs that follow each other, until one has finished the run.
        time: time limit in SLURM's words, in place of the cluster's.
        rewards_nodes: 1 puts the reward service on a node of its own, 0 one on each node.
        retry: start although the same step failed three times in a row.
        allow_config_change: continue a run whose config was changed.
    """

    cfg: Config
    cluster: Cluster
    nodes: int
    chain: int = 1
    time: str | None = None
    rewards_nodes: int = 0
    retry: bool = False
    allow_config_change: bool = False

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.nodes * self.cluster.ranks_per_node


def submit(request: Request) -> list[str]:
    """Check, freeze and submit a run; return the ids of its jobs, one for each link of the chain.

    Raises:
        ValueError: the request does not fit together, or SLURM is not here or refuses; one line, nothing submitted.
    """
    raise ValueError("not ready yet")
