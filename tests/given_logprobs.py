"""A policy update on log-probs that are given as numbers: no model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from megatron_vlmr1.config import parse
from megatron_vlmr1.data.packing import MicroBatch, pack
from megatron_vlmr1.types import Completion, Group, Prompt


class Tables:
    """Stands where the updater and the reference do: log-probs are given numbers [n, L] instead of a model's."""

    def __init__(
        self,
        grpo: dict[str, Any],
        new: torch.Tensor,
        old: torch.Tensor | None,
        reference: torch.Tensor | None,
        max_new_tokens: int = 256,
    ):
        raw = {"model": {"path": "-"}, "data": {"train": "-"}, "grpo": grpo}
        self.cfg = parse({**raw, "rollout": {"max_new_tokens": max_new_tokens}}, "test")
        self.new, self.old, self.reference = new, old, reference
        self.gradients: list[torch.Tensor] = []
        self._swapped = False

    @property
    def policy(self) -> Any:
        mesh = SimpleNamespace(dp_group=None, is_last_stage=True, tp_rank=0)
        return SimpleNamespace(mesh=mesh, logprobs=lambda hidden, rows, ids: (hidden, torch.ones(len(hidden))))

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        self._swapped = True
        yield
        self._swapped = False

    def micro_batches(self, groups: list) -> list[MicroBatch]:
        return [pack([group], 500, 1) for group in groups]

    def logprobs(self, batches: list[MicroBatch], size: tuple[int, int]) -> torch.Tensor:
        table = self.reference if self._swapped else self.old
        assert table is not None
        return table[: size[0], : size[1]]

    def step(self, batches: list[MicroBatch], loss: Any, lr: float) -> tuple[list, dict[str, float]]:
        leaf = self.new.clone().requires_grad_()
        results = []
        for batch in batches:
            value, result = loss(leaf[batch.label_slots, batch.label_index], batch)
            value.backward()
            results.append(result)
        assert leaf.grad is not None
        self.gradients.append(leaf.grad)
        return results, {"train/skipped": 0.0}


def group(
    lengths: Sequence[int],
    advantages: Sequence[float],
    rollout: Sequence[Sequence[float]] = (),
    drawn: Sequence[Sequence[float]] = (),
) -> Group:
    """A group of completions of so many tokens.

    `rollout` are their log-probs when they were sampled, or zeros; `drawn` those that they were drawn from, if unlike.
    """
    ids = np.zeros(2, np.int64)
    prompt = Prompt(0, "k", ids, np.zeros((3, 2), np.int64), (), "", "")
    rows = rollout or [[0.0] * n for n in lengths]
    others = [np.array(row, np.float32) for row in drawn] or [None] * len(rows)
    completions = tuple(
        Completion(np.ones(n, np.int64), np.array(row, np.float32), "stop", "", other)
        for n, row, other in zip(lengths, rows, others, strict=True)
    )
    return Group(prompt, completions, (), np.array(advantages, np.float32))


def groups(lengths: Sequence[int], advantages: Sequence[float]) -> list[Group]:
    """One group for each completion."""
    return [group([n], [a]) for n, a in zip(lengths, advantages, strict=True)]
