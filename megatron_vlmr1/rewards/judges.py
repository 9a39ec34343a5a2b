"""Scores for a trainer's ranks: one rank per copy of the model asks, all of them get the same answer."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_vlmr1.config import RewardsConfig
from megatron_vlmr1.parallel.mesh import Mesh
from megatron_vlmr1.rewards import functions, tasks
from megatron_vlmr1.rewards.client import RewardClient
from megatron_vlmr1.rewards.item import Compat
from megatron_vlmr1.rewards.service import RewardService
from megatron_vlmr1.rewards.task import Task
from megatron_vlmr1.runtime import device, distributed
from megatron_vlmr1.runtime.ranks import identity
from megatron_vlmr1.types import Completion, Group, Prompt, Score

logger = logging.getLogger(__name__)


class Judges:
    """Sends completions to the reward processes as they end, and gathers their scores."""

    def __init__(self, address: str, task: Task, cfg: RewardsConfig, mesh: Mesh, timeout_s: float) -> None:
        """`address` of the node's reward service, empty where nothing will be asked; `timeout_s` of the collectives in
        which other ranks wait for us."""
        self.task, self.mesh = task, mesh
        self.compat: Compat = cfg.compat
        self.weights = dict(cfg.weights or task.recipe)
        self._cfg, self._longest_s = cfg, 0.8 * timeout_s
        self._client = RewardClient(address) if mesh.is_model_leader and address else None

    def submit(self, index: int, number: int, prompt: Prompt, completion: Completion) -> None:
        """Ask for the score of completion `number` of group `index`; returns at once, on all ranks."""
        if self._client is not None:
            item = self.task.item(completion.text, prompt, self.compat)
            self._client.submit(f"{index}/{number}", item, self.weights)
            self._client.poll()

    def collect(self, groups: Sequence[Group]) -> list[Group]:
        """Wait for all scores; every rank of the model group returns the same scored groups."""
        scores: list[list[Score]] = []
        if self._client is not None:
            ids = [f"{i}/{j}" for i, group in enumerate(groups) for j in range(len(group.completions))]
            # Every item may run into its deadline twice, as many at a time as there are workers.
            worst_s = 30.0 + 2 * self._cfg.deadline_s * -(-len(ids) // self._cfg.workers)
            found = self._client.collect(ids, min(worst_s, self._longest_s))
            scores = [[found[f"{i}/{j}"] for j in range(len(g.completions))] for i, g in enumerate(groups)]
            self._log_failures([s for group in scores for s in group])
        return self._shared(groups, scores)

    def stats(self) -> dict[str, Any]:
        """Return the service's figures where this rank asks it, else nothing."""
        return self._client.stats() if self._client is not None else {}

    def close(self) -> None:
        """Disconnect."""
        if self._client is not None:
            self._client.close()

    def _log_failures(self, scores: list[Score]) -> None:
        failures = Counter(s.failure for s in scores if s.failure is not None)
        for reason, count in failures.most_common(3):
            logger.warning("reward failed for %d of %d completions: %s", count, len(scores), reason)

    def _shared(self, groups: Sequence[Group], scores: list[list[Score]]) -> list[Group]:
        """Give the leader's scores to the whole model group, as numbers: NaN is a failure."""
        names = sorted(self.weights)
        counts = [len(group.completions) for group in groups]
        table = torch.full((sum(counts), 1 + len(names)), float("nan"), dtype=torch.float64, device=device.device())
        for row, score in enumerate(s for group in scores for s in group):
            if score.value is not None:
                table[row] = torch.tensor([score.value, *(score.parts[name] for name in names)], dtype=torch.float64)
        if self.mesh.world > self.mesh.dp_size and len(table):
            dist.broadcast(table, self.mesh.model_leader, group=self.mesh.model_group)
        rows = iter(table.cpu().tolist())
        out = []
        for i, group in enumerate(groups):
            shared = []
            for j in range(counts[i]):
                value, *parts = next(rows)
                if value != value:
                    reason = scores[i][j].failure if scores else "failed; see the log of the rank that asked"
                    shared.append(Score(None, failure=reason))
                else:
                    shared.append(Score(value, dict(zip(names, parts, strict=True))))
            out.append(replace(group, scores=tuple(shared)))
        return out


@contextmanager
def judges(
    cfg: RewardsConfig, task: str, mesh: Mesh, log_dir: Path, timeout_s: float, serve: bool = True
) -> Iterator[Judges]:
    """Start a reward service on each node's first rank and connect every rank to its own node's.

    Without `serve` nothing is started, for groups that have their scores already.

    Raises:
        ValueError: an unknown task or reward, or settings that the service refuses.
    """
    known = tasks.get(task)
    for name in cfg.weights:
        functions.get(name)
    with ExitStack() as stack:
        me = identity()
        local_rank = me.local_rank if me else 0
        starts = serve and local_rank == 0
        address = stack.enter_context(RewardService(cfg, log_dir)).address if starts else ""
        address = distributed.from_node_leader(address, local_rank)
        asked = Judges(address, known, cfg, mesh, timeout_s)
        stack.callback(asked.close)
        yield asked
