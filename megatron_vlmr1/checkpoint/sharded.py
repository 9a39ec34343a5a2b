"""megatron-core's distributed checkpoint, written so that no rank's disk can leave the others waiting.

The files are those of `dist_checkpointing.save` and are read by `dist_checkpointing.load`. The writing is ours, because
there a rank that cannot write its part raises while the other ranks are in a collective, and because it starts a
manager and writer processes, which outlive a killed rank. Here all collectives come first (`Sharded`), then each rank
writes on its own, now or in a thread, and the first rank ends it with the metadata (`finish`).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import _DistWrapper

from megatron_vlmr1.checkpoint.background import Writes
from megatron_vlmr1.checkpoint.staging import Staging


class _Writer(FileSystemWriter):
    @property
    def checkpoint_id(self) -> str:
        """Text, because it is pickled into the metadata, and paths are not among what is read from there."""
        return str(self.path)


class Sharded:
    """A sharded state dict on its way into an empty directory; all ranks make one.

    Attributes:
        results: where this rank's tensors lie in its file, once that is written; `finish` wants them of all ranks.
    """

    def __init__(self, state: dict[str, Any], directory: Path, writes: Writes, staging: Staging | None) -> None:
        """Agree with all ranks on who writes what, and add this rank's part to `writes`.

        Args:
            state: as megatron-core's `sharded_state_dict` functions return it.
            directory: on a file system that all ranks share.
            writes: takes what this rank writes.
            staging: memory into which tensors are copied, wherever they lie now; None where they stay as they are
                until they are written.

        Raises:
            OSError: some rank could not; the same line on every rank.
        """
        self._directory = directory
        self._metadata: Metadata | None = None  # the first rank's
        self.results: list[WriteResult] = []
        sharded, common = save_preprocess(state)
        if dist.get_rank() == 0:
            serialized = io.BytesIO()
            torch.save(common, serialized)
            writes.add(partial(_write_common, serialized, directory))
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, True)
        for key, parts in by_key.items():
            for part in parts:
                if staging is not None and isinstance(part, ShardedTensor):
                    part.data = staging.copy(f"{key} {part.global_offset}", part.data)
        self._planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        # One thread: what fails in a second one is lost, and with it a part of the checkpoint.
        # No copying ahead: in a thread of ours that would wait on GPU 0, where every rank would then hold a context.
        self._writer = _Writer(directory, sync_files=False, thread_count=1, per_thread_copy_ahead=0)
        writes.add(partial(self._write, self._plan(mcore_to_pyt_state_dict(by_key, False))))

    def finish(self, results: Sequence[list[WriteResult]]) -> None:
        """Write the metadata, from the results of all ranks in order; the first rank calls it.

        Raises:
            OSError: the disk failed.
        """
        assert self._metadata is not None
        self._writer.finish(self._metadata, list(results))

    def _plan(self, state: dict[str, Any]) -> SavePlan:
        ranks = _DistWrapper(None, True, 0)

        def mine() -> SavePlan:
            meta = self._writer.storage_meta()
            self._planner.set_up_planner(state_dict=state, storage_meta=meta, is_coordinator=ranks.is_coordinator)
            self._writer.set_up_storage_writer(ranks.is_coordinator)
            return self._writer.prepare_local_plan(self._planner.create_local_plan())

        def overall(plans: list[SavePlan]) -> list[SavePlan]:
            plans, self._metadata = self._planner.create_global_plan(plans)
            return self._writer.prepare_global_plan(plans)

        try:
            return self._planner.finish_plan(ranks.reduce_scatter("plan", mine, overall))
        except CheckpointException as error:  # raised on all ranks, as soon as one has failed
            raise OSError("; ".join(f"rank {rank}: {why}" for rank, (why, _) in error.failures.items())) from error

    def _write(self, plan: SavePlan) -> list[Path]:
        try:
            self.results = self._writer.write_data(plan, self._planner).wait()
        except RuntimeError as error:  # torch's word for a full disk
            raise OSError(str(error)) from error
        return sorted(self._directory.glob(f"__{dist.get_rank()}_*.distcp"))


def _write_common(serialized: io.BytesIO, directory: Path) -> list[Path]:
    path = directory / COMMON_STATE_FNAME
    path.write_bytes(serialized.getbuffer())
    save_config(CheckpointingConfig("torch_dist", 1), str(directory))
    return [path, directory / "metadata.json"]
