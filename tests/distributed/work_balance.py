"""What ranks do in tests of balance: exchange lopsided groups, and compute gradients with what they then have."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from megatron_vlmr1.data.balance import balanced
from megatron_vlmr1.data.costs import update_cost
from megatron_vlmr1.parallel import exchange
from megatron_vlmr1.parallel.mesh import Mesh
from megatron_vlmr1.train.work import trained
from megatron_vlmr1.types import Completion, Group
from tests.checkpoints import banned_ids, mixed_prompts
from tests.distributed import work
from tests.distributed.ranks import layout

BUDGETS = (60, 10_000)  # tokens of a micro-batch: long groups are cut; everything together
LENGTHS = ((2, 3, 1), (30, 1, 17, 21), (4, 1), (25, 8, 40), (1, 1), (9, 1, 14))  # by prompt; even ones are rank 0's


def lopsided_groups(directory: Path) -> list[Group]:
    """Short completions of text for rank 0, long ones of images for rank 1; one score failed on either."""
    rng = np.random.default_rng(2)
    allowed = np.setdiff1d(np.arange(390), banned_ids(directory))  # transformers gives the padding's row no gradient
    groups = []
    for prompt, lengths in zip(mixed_prompts(directory), LENGTHS, strict=True):
        advantages = rng.standard_normal(len(lengths)).astype(np.float32)
        if prompt.position in (0, 3):
            advantages[1] = np.nan
        completions = tuple(
            Completion(rng.choice(allowed, n).astype(np.int64), rng.standard_normal(n).astype(np.float32), "stop", "")
            for n in lengths
        )
        groups.append(Group(prompt, completions, (), advantages))
    return groups


def pair(root: Path) -> None:
    """Two data-parallel ranks."""
    with layout("dp2") as mesh:
        _check(root, "dp2", mesh)


def four(root: Path) -> None:
    """Two copies of the model, each on two ranks."""
    for name in ("tp2", "pp2"):
        with layout(name) as mesh:
            _check(root, f"{name}_dp2", mesh)


def _check(root: Path, name: str, mesh: Mesh) -> None:
    source = root / "untied"
    policy, reference = work.with_reference(source, root / "untied_reference", mesh)
    policy.wrap_for_training()
    mine = work.share(lopsided_groups(source), mesh)
    costs = [update_cost(policy.shape, g.prompt, trained(g), freeze_vision=False) for g in mine]
    seen: dict[str, Any] = {"costs": {g.prompt.position: c for g, c in zip(mine, costs, strict=True)}}
    sent: list[list[int]] = []
    with mock.patch.object(exchange, "dist", _Recorded(sent)):
        after = balanced(mine, costs, mesh)
        seen["calls"] = len(sent)
        evened = balanced([replace(g, advantages=None) for g in mine], [7] * len(mine), mesh)
        seen["calls_when_even"] = len(sent) - seen["calls"]
    assert [g.prompt.position for g in evened] == [g.prompt.position for g in mine]
    seen["sent_bytes"] = sent[1]  # the first call is about sizes
    seen["after"] = [g.prompt.position for g in after]
    seen["pixels"] = {g.prompt.position: sum(image.patches.nbytes for image in g.prompt.images) for g in after}
    for budget in BUDGETS:
        metrics = work.still_update(policy, reference, budget)(after, 0.0)
        work.write_gradients(policy, source, root / f"balanced_{name}_{budget}")
    (root / f"balanced_{name}_{mesh.rank}.json").write_text(json.dumps({**seen, "metrics": metrics}))


class _Recorded:
    """torch.distributed, and how many elements each call of `all_to_all_single` sends to each rank."""

    def __init__(self, sent: list[list[int]]) -> None:
        self._sent = sent

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.distributed, name)

    def all_to_all_single(self, target: Any, source: Any, received: Any = None, sent: Any = None, group: Any = None):
        """Record and pass on."""
        self._sent.append(list(sent) if sent is not None else [len(source)])
        return torch.distributed.all_to_all_single(target, source, received, sent, group=group)
