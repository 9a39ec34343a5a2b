"""Groups to packed micro-batches: each prompt once, then its completions.

The prompt's last position predicts the first token of every completion: one hidden row, as many labels. A
completion's last token predicts nothing, so it is not fed. Positions continue from the prompt's largest M-RoPE
position for each completion alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_vlmr1.data.bins import fill
from megatron_vlmr1.models.attention import AttentionPlan
from megatron_vlmr1.models.policy import Policy
from megatron_vlmr1.models.segments import Segment
from megatron_vlmr1.models.vlm import ModelInput
from megatron_vlmr1.runtime import device
from megatron_vlmr1.types import ImagePatches, IntArray, Prompt


@dataclass(frozen=True)
class PackedGroup:
    """One prompt and the completions that are trained on together."""

    prompt: Prompt
    completions: tuple[IntArray, ...]  # token ids
    slots: tuple[int, ...]  # where each completion's numbers lie in the step's tables

    @property
    def tokens(self) -> int:
        """Tokens that the language model is fed."""
        return len(self.prompt.token_ids) + sum(len(c) - 1 for c in self.completions)


@dataclass(frozen=True)
class MicroBatch:
    """One packed row, as arrays. T input tokens, R labels, M image tokens."""

    token_ids: IntArray  # [T]
    positions: IntArray  # [3, T]
    segments: tuple[Segment, ...]
    images: tuple[ImagePatches, ...]  # each unique image once
    image_rows: IntArray  # [M]
    image_order: tuple[int, ...]
    label_rows: IntArray  # [R], the input position that predicts each label
    label_ids: IntArray  # [R]
    label_slots: IntArray  # [R], the completion each label belongs to
    label_index: IntArray  # [R], its position within that completion


def pack(groups: Sequence[PackedGroup], image_token_id: int, multiple: int) -> MicroBatch:
    """Lay groups one after another, padded to a multiple of `multiple` tokens (at least one token).

    Padding tokens see only themselves and predict nothing.
    """
    ids, positions, segments, rows, labels, slots, index = [], [], [], [], [], [], []  # type: ignore[var-annotated]
    images: dict[bytes, int] = {}
    unique: list[ImagePatches] = []
    image_order: list[int] = []
    offset = 0
    for group in groups:
        prompt = group.prompt
        n = len(prompt.token_ids)
        ids.append(prompt.token_ids)
        positions.append(prompt.mrope_positions)
        segments.append(Segment(offset, offset + n))
        for image in prompt.images:
            if image.digest not in images:
                images[image.digest] = len(unique)
                unique.append(image)
            image_order.append(images[image.digest])
        end = offset + n
        for tokens, slot in zip(group.completions, group.slots, strict=True):
            fed = len(tokens) - 1
            ids.append(tokens[:-1])
            positions.append(np.broadcast_to(prompt.next_position + np.arange(fed), (3, fed)))
            segments.append(Segment(end, end + fed, prefix=(offset, offset + n)))
            rows.append(np.concatenate(([offset + n - 1], end + np.arange(fed))))
            labels.append(tokens)
            slots.append(np.full(len(tokens), slot))
            index.append(np.arange(len(tokens)))
            end += fed
        offset = end
    padding = -offset % multiple if offset else multiple
    if padding:
        ids.append(np.zeros(padding, dtype=np.int64))
        positions.append(np.zeros((3, padding), dtype=np.int64))
        segments.append(Segment(offset, offset + padding))
    token_ids = np.concatenate(ids)
    image_rows = np.flatnonzero(token_ids[:offset] == image_token_id)
    return MicroBatch(
        token_ids=token_ids,
        positions=np.concatenate(positions, axis=1),
        segments=tuple(segments),
        images=tuple(unique),
        image_rows=image_rows,
        image_order=tuple(image_order),
        label_rows=_joined(rows),
        label_ids=_joined(labels),
        label_slots=_joined(slots),
        label_index=_joined(index),
    )


def _joined(parts: Sequence[IntArray]) -> IntArray:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def split_by_tokens(
    groups: Sequence[PackedGroup],
    budget: int,
    at_least: int = 1,
    cost: Callable[[PackedGroup], int] = lambda group: group.tokens,
) -> list[list[PackedGroup]]:
    """Form micro-batches of about equal cost within a token budget.

    A group that is larger than the budget is cut between completions, its prompt repeated in each part. Only a single
    completion that is too long together with its prompt exceeds the budget, in a micro-batch of its own.

    Args:
        groups: this rank's groups.
        budget: packed tokens of one micro-batch.
        at_least: how many micro-batches to make, where there are that many groups.
        cost: of a group.
    """
    parts = [part for group in groups for part in _cut(group, budget)]
    bins = fill([cost(part) for part in parts], [part.tokens for part in parts], budget, at_least)
    return [[parts[i] for i in items] for items in bins]


def _cut(group: PackedGroup, budget: int) -> list[PackedGroup]:
    if group.tokens <= budget or len(group.completions) < 2:
        return [group]
    fed = [len(tokens) - 1 for tokens in group.completions]
    return [
        PackedGroup(group.prompt, tuple(group.completions[i] for i in part), tuple(group.slots[i] for i in part))
        for part in fill(fed, fed, budget - len(group.prompt.token_ids))
    ]


def model_input(batch: MicroBatch, policy: Policy) -> ModelInput:
    """Put a micro-batch on the device, with image embeddings where they may be reused."""
    where = device.device()
    first = policy.mesh.is_first_stage
    return ModelInput(
        token_ids=torch.from_numpy(batch.token_ids).to(where),
        positions=torch.from_numpy(batch.positions).to(where),
        attend=AttentionPlan(batch.segments),
        images=batch.images if first else (),
        image_rows=torch.from_numpy(batch.image_rows).to(where),
        image_order=batch.image_order,
        features=policy.features(batch.images) if first else None,
    )
