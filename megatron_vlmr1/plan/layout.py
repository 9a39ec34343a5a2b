"""Where ranks are, and over which link each of their groups speaks. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vlmr1.config import ParallelConfig
from megatron_vlmr1.plan.hardware import Link


@dataclass(frozen=True)
class Layout:
    """A job's ranks: megatron-core numbers them tensor first, then data, then pipeline."""

    tp: int
    pp: int
    vp: int
    dp: int
    sequence_parallel: bool
    layers: tuple[int, ...]  # of each chunk; chunk c is on stage c mod pp
    per_node: int

    @property
    def world(self) -> int:
        """All ranks."""
        return self.tp * self.pp * self.dp

    @property
    def tp_link(self) -> Link:
        """Neighbours."""
        return self._link(self.tp)

    @property
    def dp_link(self) -> Link:
        """Ranks a tensor-parallel group apart."""
        return self._link(self.tp * self.dp)

    @property
    def pp_link(self) -> Link:
        """Stages; the slowest of their ways."""
        return self._link(self.world)

    @property
    def dp_on_node(self) -> int:
        """Ranks of a data-parallel group that share a node: its rings cross between nodes at each of them."""
        return min(self.dp, max(1, self.per_node // self.tp))

    @property
    def nodes(self) -> int:
        """All nodes."""
        return -(-self.world // self.per_node)

    @property
    def first_nodes(self) -> int:
        """Nodes with a stage of the first copy, which writes the weights."""
        return len({stage * self.tp * self.dp // self.per_node for stage in range(self.pp)})

    def stage_layers(self, stage: int) -> int:
        """Return how many layers a pipeline stage has, in all its chunks."""
        return sum(self.layers[stage :: self.pp])

    def _link(self, span: int) -> Link:
        within = self.world <= self.per_node or self.per_node % span == 0  # else some group lies on two nodes
        return "nvlink" if within else "network"


def layout(parallel: ParallelConfig, num_layers: int, world: int, per_node: int) -> Layout:
    """Return the layout of a job.

    Raises:
        ValueError: ranks would be left over, or layers do not divide.
    """
    return Layout(
        tp=parallel.tensor_model_parallel_size,
        pp=parallel.pipeline_model_parallel_size,
        vp=parallel.virtual_pipeline_model_parallel_size,
        dp=parallel.data_parallel_size(world),
        sequence_parallel=parallel.sequence_parallel,
        layers=parallel.layers_by_chunk(num_layers),
        per_node=per_node,
    )


def decoding_links(training: Layout, tp: int, pp: int) -> tuple[Link, Link]:
    """Return over which links a decoding copy's tensor-parallel group and its stages speak.

    A training copy's ranks, in their order, are laid out anew as (pipeline, copies, tensor).
    """
    stride = training.tp * training.dp
    ranks = [stage * stride + i for stage in range(training.pp) for i in range(training.tp)]
    copies = len(ranks) // (tp * pp)

    def link(group: list[int]) -> Link:
        return "nvlink" if len({rank // training.per_node for rank in group}) == 1 else "network"

    groups = [ranks[i * tp : (i + 1) * tp] for i in range(copies * pp)]
    across: Link = "network" if "network" in map(link, groups) else "nvlink"
    return across, link(ranks[:: copies * tp])
