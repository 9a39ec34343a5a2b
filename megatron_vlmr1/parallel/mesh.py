"""The job's ranks as one value object."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_vlmr1.config import ParallelConfig
from megatron_vlmr1.runtime import distributed


@dataclass(frozen=True)
class Mesh:
    """This rank's place and the groups it belongs to. world = data x pipeline x tensor."""

    rank: int
    world: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    vp_size: int  # chunks of layers on each pipeline stage
    dp_rank: int
    dp_size: int
    sequence_parallel: bool
    layout: ParallelConfig  # what this mesh was built from
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    model_group: dist.ProcessGroup  # the ranks that hold one copy of the model (tensor x pipeline)
    groups: ProcessGroupCollection  # the same, as megatron-core wants them

    def __post_init__(self) -> None:
        assert self.world == self.tp_size * self.pp_size * self.dp_size

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank embeds tokens and images, in its first chunk."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes log-probs and losses, after its last chunk."""
        return self.pp_rank == self.pp_size - 1

    @property
    def is_model_leader(self) -> bool:
        """Whether this rank speaks for its copy of the model: the first rank of the model group."""
        return self.tp_rank == 0 and self.pp_rank == 0

    @property
    def model_leader(self) -> int:
        """Global rank of the leader of this copy of the model."""
        return dist.get_global_rank(self.model_group, 0)

    def describe(self) -> dict[str, int | bool]:
        """Return the layout's sizes, for logs and manifests."""
        return {
            "world": self.world,
            "tensor_model_parallel_size": self.tp_size,
            "pipeline_model_parallel_size": self.pp_size,
            "virtual_pipeline_model_parallel_size": self.vp_size,
            "data_parallel_size": self.dp_size,
            "sequence_parallel": self.sequence_parallel,
        }


def build(cfg: ParallelConfig) -> Mesh:
    """Create the groups over the joined process group.

    Raises:
        ValueError: the world is not a multiple of tensor x pipeline.
    """
    tp, pp, world = cfg.tensor_model_parallel_size, cfg.pipeline_model_parallel_size, dist.get_world_size()
    vp = cfg.virtual_pipeline_model_parallel_size
    cfg.data_parallel_size(world)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vp if vp > 1 else None,
        distributed_timeout_minutes=-(-cfg.timeout_s // 60),
    )
    return Mesh(
        rank=dist.get_rank(),
        world=world,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=tp,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=pp,
        vp_size=vp,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        sequence_parallel=cfg.sequence_parallel,
        layout=cfg,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        model_group=parallel_state.get_model_parallel_group(),
        groups=ProcessGroupCollection.use_mpu_process_groups(),
    )


def decoding(training: Mesh, cfg: ParallelConfig) -> Mesh:
    """Lay the ranks of each copy of the training model out anew, as one or more copies for generation.

    The data-parallel group of the result is within one training copy: its members share out that copy's prompts.
    All ranks of the world call it.

    Raises:
        ValueError: `cfg`'s tensor x pipeline does not divide the training layout's.
    """
    tp, pp = cfg.tensor_model_parallel_size, cfg.pipeline_model_parallel_size
    size = training.tp_size * training.pp_size
    if size % (tp * pp):
        raise ValueError(
            f"rollout.tensor_model_parallel_size={tp} x rollout.pipeline_model_parallel_size={pp} does not divide the "
            f"{size} ranks that hold one copy of the model in training"
        )
    copies = size // (tp * pp)
    tp_groups, pp_groups, dp_groups, model_groups = [], [], [], []
    for ranks in _copies_of_the_model(training):
        grid = np.array(ranks).reshape(pp, copies, tp)  # neighbours share a layer, as in training
        tp_groups += grid.reshape(-1, tp).tolist()
        pp_groups += grid.transpose(1, 2, 0).reshape(-1, pp).tolist()
        dp_groups += grid.transpose(0, 2, 1).reshape(-1, copies).tolist()
        model_groups += grid.transpose(1, 0, 2).reshape(copies, -1).tolist()
    timeout = timedelta(seconds=cfg.timeout_s)
    tp_group, pp_group, dp_group, model_group = (
        _own_group(groups, training.rank, timeout) for groups in (tp_groups, pp_groups, dp_groups, model_groups)
    )
    groups = copy.copy(training.groups)
    groups.tp, groups.pp, groups.dp, groups.mp = tp_group, pp_group, dp_group, model_group
    groups.embd = groups.pos_embd = None  # of gradients, which there are none of here
    return Mesh(
        rank=training.rank,
        world=training.world,
        tp_rank=dist.get_rank(tp_group),
        tp_size=tp,
        pp_rank=dist.get_rank(pp_group),
        pp_size=pp,
        vp_size=1,
        dp_rank=dist.get_rank(dp_group),
        dp_size=training.world // (tp * pp),
        sequence_parallel=False,
        layout=cfg,
        tp_group=tp_group,
        pp_group=pp_group,
        dp_group=dp_group,
        model_group=model_group,
        groups=groups,
    )


@contextmanager
def pretending() -> Iterator[None]:
    """Let `pretended` meshes be used: megatron-core takes every group for one of size 1 outside a job."""
    if dist.is_initialized():
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group(dist.Backend.FAKE, rank=0, world_size=1, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def pretended(cfg: ParallelConfig, tp_rank: int, pp_rank: int) -> Mesh:
    """Return what a rank of one copy of the model would be in a layout, without a job.

    Its groups know their size and this rank's place, so that models can be built for it, and carry no data.
    """
    tp, pp = cfg.tensor_model_parallel_size, cfg.pipeline_model_parallel_size
    rank = pp_rank * tp + tp_rank
    groups = ProcessGroupCollection()
    for field in fields(ProcessGroupCollection):
        setattr(groups, field.name, _silent_group(0, 1))
    groups.tp, groups.pp, groups.mp = (
        _silent_group(tp_rank, tp),
        _silent_group(pp_rank, pp),
        _silent_group(rank, tp * pp),
    )
    groups.embd = groups.pos_embd = None  # of gradients
    return Mesh(
        rank=rank,
        world=tp * pp,
        tp_rank=tp_rank,
        tp_size=tp,
        pp_rank=pp_rank,
        pp_size=pp,
        vp_size=cfg.virtual_pipeline_model_parallel_size,
        dp_rank=0,
        dp_size=1,
        sequence_parallel=cfg.sequence_parallel,
        layout=cfg,
        tp_group=groups.tp,
        pp_group=groups.pp,
        dp_group=groups.dp,
        model_group=groups.mp,
        groups=groups,
    )


def _silent_group(rank: int, size: int) -> dist.ProcessGroup:
    from torch._C import _distributed_c10d as c10d

    fake: Any = c10d.FakeProcessGroup  # whose type stubs are behind
    make = getattr(fake, "_create_internal", None)  # torch from 2.10 on, where the constructor is gone
    group: dist.ProcessGroup = make(rank, size, fake.Options()) if make else fake(rank, size)
    return group


def _copies_of_the_model(mesh: Mesh) -> list[list[int]]:
    """Return the global ranks of every copy of the model, each in order."""
    table = distributed.every_row(torch.tensor(dist.get_process_group_ranks(mesh.model_group)))
    return [list(ranks) for ranks in sorted({tuple(row) for row in table.tolist()})]


def _own_group(groups: list[list[int]], rank: int, timeout: timedelta) -> dist.ProcessGroup:
    """Create all groups, as every rank has to, and return the one that `rank` belongs to."""
    made = [(ranks, dist.new_group(ranks, timeout=timeout)) for ranks in groups]
    (own,) = [group for ranks, group in made if rank in ranks]
    return own


@contextmanager
def building_for(mesh: Mesh) -> Iterator[None]:
    """Let megatron-core's modules be built for a mesh that is not the training one.

    They count layers by its global state (pipeline_parallel_layer_layout.py), which knows the training layout only.
    """
    virtual = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    parallel_state.set_pipeline_model_parallel_rank(mesh.pp_rank)
    parallel_state.set_virtual_pipeline_model_parallel_world_size(mesh.vp_size if mesh.vp_size > 1 else None)
    try:
        yield
    finally:
        parallel_state.set_pipeline_model_parallel_rank(None)
        parallel_state.set_virtual_pipeline_model_parallel_world_size(virtual)


def destroy() -> None:
    """Forget the groups, so that another layout can be built over the same ranks."""
    parallel_state.destroy_model_parallel()
