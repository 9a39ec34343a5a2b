"""megatron-core's distributed checkpoint, written so that no rank's disk can leave the others waiting.

The files are those of `dist_checkpointing.save` and are read by `dist_checkpointing.load`. The writing is ours, because
there a rank that cannot write its part raises while the other ranks are in a collective, and because it starts a
manager and writer processes, which outlive a killed rank. `torch.distributed.checkpoint.save` writes in threads and
raises on all ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.api import CheckpointException

from megatron_vlmr1.runtime import distributed

_THREADS = 2  # and files, of each rank


class _Writer(torch_checkpoint.FileSystemWriter):
    @property
    def checkpoint_id(self) -> str:
        """Text, because it is pickled into the metadata, and paths are not among what is read from there."""
        return str(self.path)


def save(state: dict[str, Any], directory: Path) -> None:
    """Write a sharded state dict into an empty directory; all ranks call it.

    Args:
        state: as megatron-core's `sharded_state_dict` functions return it.
        directory: on a file system that all ranks share.

    Raises:
        OSError: some rank could not write; the same line on every rank.
    """
    sharded, common = save_preprocess(state)
    distributed.agree(_write_common(common, directory))
    distributed.agree(_write_sharded(sharded, directory))


def _write_common(common: dict[str, Any], directory: Path) -> str:
    if dist.get_rank() != 0:
        return ""
    try:
        TorchCommonSaveStrategy("torch", 1).save_common(common, directory)
        save_config(CheckpointingConfig("torch_dist", 1), str(directory))
    except (OSError, RuntimeError) as error:  # RuntimeError: torch.save on a full disk
        return str(error)
    return ""


def _write_sharded(sharded: dict[str, Any], directory: Path) -> str:
    by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, True)
    writer = _Writer(directory, sync_files=False, thread_count=_THREADS)
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    try:
        torch_checkpoint.save(mcore_to_pyt_state_dict(by_key, False), storage_writer=writer, planner=planner)
    except CheckpointException as error:  # raised on all ranks, as soon as one has failed
        return "; ".join(f"rank {rank}: {reason}" for rank, (reason, _) in error.failures.items())
    return ""
