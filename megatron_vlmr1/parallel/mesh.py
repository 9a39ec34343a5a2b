"""The job's ranks as one value object."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_vlmr1.config import ParallelConfig


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
    if world % (tp * pp):
        raise ValueError(
            f"{world} ranks cannot hold parallel.tensor_model_parallel_size={tp} x "
            f"parallel.pipeline_model_parallel_size={pp}: start a multiple of {tp * pp} ranks"
        )
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


def destroy() -> None:
    """Forget the groups, so that another layout can be built over the same ranks."""
    parallel_state.destroy_model_parallel()
