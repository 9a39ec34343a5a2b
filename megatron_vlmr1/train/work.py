"""The work of a step: shared out evenly before the update."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_vlmr1.data.balance import Item, balanced
from megatron_vlmr1.data.costs import update_cost
from megatron_vlmr1.data.packing import PackedGroup
from megatron_vlmr1.train.run import Run
from megatron_vlmr1.types import Group


def even_out(items: Sequence[Item], run: Run) -> list[Item]:
    """Return the groups that this data-parallel rank shall train on, of those that all ranks have."""
    if not run.cfg.train.balance:
        return list(items)
    policy = run.actor.policy
    costs = [update_cost(policy.shape, item.prompt, trained(item), policy.freeze_vision) for item in items]
    return balanced(items, costs, run.mesh)


def trained(item: Group | PackedGroup) -> list[int]:
    """Return the lengths of the completions that take part in the update: those that have an advantage."""
    if isinstance(item, PackedGroup):
        return [len(tokens) for tokens in item.completions]
    assert item.advantages is not None
    pairs = zip(item.completions, item.advantages, strict=True)
    return [len(completion.token_ids) for completion, advantage in pairs if np.isfinite(advantage)]
