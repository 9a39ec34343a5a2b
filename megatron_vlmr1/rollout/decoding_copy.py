"""Generation in another layout than training's: a second set of weights that lives from rollout to update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist

from megatron_vlmr1.config import ParallelConfig
from megatron_vlmr1.models.policy import Policy
from megatron_vlmr1.parallel import mesh as meshes
from megatron_vlmr1.rollout.engine import Engine, Limits
from megatron_vlmr1.rollout.graphs import Recorder
from megatron_vlmr1.rollout.lane import OnFinish
from megatron_vlmr1.rollout.reshard import Reshard
from megatron_vlmr1.rollout.sampling import Sampling
from megatron_vlmr1.runtime import device
from megatron_vlmr1.types import Completion, IntArray, Prompt


class CopyEngine(Engine):
    """An engine whose weights are copied from the training policy's, into a layout that suits decoding.

    Ranks that hold one copy of the training model hold one or more for decoding, which share out the prompts; all of
    them get all completions.
    """

    def __init__(
        self,
        training: Policy,
        layout: ParallelConfig,
        banned: Sequence[int],
        decode_text: Callable[[IntArray], str],
        max_cache_tokens: int,
        max_prefill_tokens: int,
        decode_burst: int | None = None,
        recorder: Callable[[], Recorder] | None = None,
        quantization: Literal["none", "fp8"] = "none",
    ) -> None:
        """Build the copy, without memory for its weights.

        Raises:
            ValueError: the model cannot be cut in this layout, or the ranks cannot be laid out so.
        """
        training.shape.check_layout(layout)
        mesh = meshes.decoding(training.mesh, layout)
        with meshes.building_for(mesh):
            policy = Policy(training.shape, mesh, training.chunks[0].dtype, banned)
        for parameter in policy.parameters():
            parameter.requires_grad_(False)
        super().__init__(
            policy, decode_text, max_cache_tokens, max_prefill_tokens, decode_burst, recorder, quantization
        )
        self._training = training
        self._reshard = Reshard(training.chunks, policy.chunks, training.mesh.model_group)
        self._version: int | None = None  # of the training weights that the copy holds
        self.release()

    @property
    def weights_bytes(self) -> int:
        """Bytes of the copy on this rank, now."""
        return sum(p.untyped_storage().nbytes() for p in self.policy.parameters())

    def release(self) -> None:
        """Give the memory of the copy back; the next rollout copies the weights again."""
        super().release()
        self._version = None
        self.policy.forget_features()
        for parameter in self.policy.parameters():
            parameter.untyped_storage().resize_(0)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        generations: int,
        sampling: Sampling,
        on_finish: OnFinish | None = None,
        limits: Limits | None = None,
    ) -> list[tuple[Completion, ...]]:
        """See `Engine.generate`; `on_finish` is called on the ranks that make the completion."""
        self._refresh()
        mesh = self.policy.mesh
        copies, mine = self._copies(), dist.get_rank(mesh.dp_group)
        own = range(mine, len(prompts), copies)
        told = None if on_finish is None else lambda i, j, c: on_finish(own[i], j, c)
        rows = super().generate(
            [prompts[i] for i in own],
            generations,
            sampling,
            told,
            None if limits is None else [limits[i] for i in own],
        )
        if copies == 1:
            return rows
        return self._shared(dict(zip(own, rows, strict=True)), len(prompts), generations, sampling)

    def _copies(self) -> int:
        return dist.get_world_size(self.policy.mesh.dp_group)

    def _refresh(self) -> None:
        if self._version == self._training.version:
            return
        for parameter in self.policy.parameters():
            parameter.untyped_storage().resize_(parameter.numel() * parameter.element_size())
        self._training.settle()
        self._reshard()
        self.policy.weights_changed(tower=True)
        self._version = self._training.version

    def _shared(
        self, rows: dict[int, tuple[Completion, ...]], prompts: int, generations: int, sampling: Sampling
    ) -> list[tuple[Completion, ...]]:
        """Give every rank of the training copy the completions of all: each speaks for those that it leads."""
        length = sampling.max_new_tokens
        table = np.zeros((prompts, generations, 3, length + 1))  # token ids are exact in float64
        if self.policy.mesh.is_model_leader:
            for i, row in rows.items():
                for j, c in enumerate(row):
                    n = len(c.token_ids)
                    drawn = c.logprobs if c.drawn_logprobs is None else c.drawn_logprobs
                    table[i, j, :, :n] = c.token_ids, c.logprobs, drawn
                    table[i, j, :2, length] = n, c.finish_reason == "stop"
        whole = torch.from_numpy(table).to(device.device())
        dist.all_reduce(whole, group=self._training.mesh.model_group)
        values = whole.cpu().numpy()
        return [tuple(self._completion(values[i, j], sampling) for j in range(generations)) for i in range(prompts)]

    def _completion(self, row: np.ndarray, sampling: Sampling) -> Completion:
        n, stopped = int(row[0, -1]), bool(row[1, -1])
        ids = row[0, :n].astype(np.int64)
        return Completion(
            token_ids=ids,
            logprobs=row[1, :n].astype(np.float32),
            finish_reason="stop" if stopped else "length",
            text=self.decode_text(ids[:-1] if stopped else ids),
            drawn_logprobs=row[2, :n].astype(np.float32) if sampling.changed else None,
        )
