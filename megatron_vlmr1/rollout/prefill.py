"""The forward pass over prompts that enter, and the last hidden states that first tokens are drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_vlmr1.data.packing import PackedGroup, pack
from megatron_vlmr1.models.attention import AttentionPlan
from megatron_vlmr1.rollout.forward import Forward, FusedAttend, Rotation
from megatron_vlmr1.rollout.kv_cache import KvCache, Prefill
from megatron_vlmr1.rollout.lane import Lane
from megatron_vlmr1.runtime import device
from megatron_vlmr1.types import ImagePatches


@dataclass(frozen=True)
class Job:
    """One forward pass over rows of tokens."""

    token_ids: torch.Tensor  # [T]
    rotation: Rotation
    attend: FusedAttend
    ends: torch.Tensor | None = None  # [P], rows that a token is sampled from; None: all
    images: tuple[ImagePatches, ...] = ()
    image_order: tuple[int, ...] = ()
    image_rows: torch.Tensor | None = None

    def embedded(self, forward: Forward) -> torch.Tensor:
        """Return the embeddings [T, hidden] of tokens and images; first stage only."""
        x = forward.embed(self.token_ids)
        if not self.images:
            return x
        assert self.image_rows is not None
        return forward.embed_images(x, self.images, self.image_order, self.image_rows)


def prefill_job(lane: Lane, cache: KvCache, forward: Forward) -> Job:
    """Return the pass over the prompts that enter, packed in one row."""
    policy, prompts = forward.policy, [lane.prompts[i] for i in lane.entering]
    batch = pack([PackedGroup(prompt, (), ()) for prompt in prompts], policy.shape.image_token_id, 1)
    lengths = np.array([len(prompt.token_ids) for prompt in prompts])
    return Job(
        token_ids=tensor(batch.token_ids),
        rotation=forward.rotation(tensor(batch.positions)),
        attend=Prefill(cache, AttentionPlan(batch.segments), lane.entering_slots(), lengths),
        ends=tensor(np.cumsum(lengths) - 1),
        images=batch.images,
        image_order=batch.image_order,
        image_rows=tensor(batch.image_rows),
    )


class PromptEnds:
    """Last hidden states of prompts that are in the cache while completions of theirs still wait to enter."""

    def __init__(self) -> None:
        self._kept: dict[int, torch.Tensor] = {}

    def of_new_rows(self, lane: Lane, entering: Sequence[torch.Tensor] | torch.Tensor) -> list[torch.Tensor]:
        """Return hidden states [new, hidden] for the rows that enter, in a list; an empty one where none does.

        `entering` are the last hidden states [P, hidden] of the prompts that enter with them.
        """
        out = []
        if lane.n > lane.decoding:
            self._kept |= dict(zip(lane.entering, entering, strict=True))
            out = [torch.stack([self._kept[i] for i in lane.new_rows_prompts()])]
        waits = lane.next_prompt()
        self._kept = {i: end for i, end in self._kept.items() if i == waits}
        return out


def tensor(values: npt.NDArray[Any]) -> torch.Tensor:
    """Return an array on the device."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(device.device())
