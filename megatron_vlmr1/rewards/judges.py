"""Scores for a trainer's ranks: one rank per copy of the model asks, all of them get the same answer."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist

from megatron_vlmr1.config import RewardsConfig
from megatron_vlmr1.parallel import reduce
from megatron_vlmr1.parallel.mesh import Mesh
from megatron_vlmr1.rewards import failures, tasks
from megatron_vlmr1.rewards.client import RewardClient
from megatron_vlmr1.rewards.item import Compat, Family
from megatron_vlmr1.rewards.service import RewardService
from megatron_vlmr1.rewards.task import Task
from megatron_vlmr1.runtime import device, distributed
from megatron_vlmr1.runtime.ranks import identity
from megatron_vlmr1.types import Completion, Group, Prompt, Score

_ELSEWHERE = "failed; see the log of the rank that asked"
_QUOTED = 300  # characters of a text that failed
_ANSWER_S = 60.0  # time that a service elsewhere has to answer

logger = logging.getLogger(__name__)


class Judges:
    """Sends completions to the reward processes as they end, and gathers their scores.

    Of the ranks that generate a completion together one asks for its score; the ranks that hold one copy of the model
    then share what they know.
    """

    def __init__(
        self, address: str, task: Task, cfg: RewardsConfig, mesh: Mesh, asks: bool, timeout_s: float, family: Family
    ) -> None:
        """Connect.

        Args:
            address: of the reward service, empty where nothing will be asked.
            task: renders items.
            cfg: weights and deadlines.
            mesh: the ranks of training.
            asks: whether this rank asks for what it generates.
            timeout_s: of the collectives in which other ranks wait for us.
            family: of the model, whose published rules the published rewards follow.
        """
        self.task, self.mesh = task, mesh
        self.compat: Compat = cfg.compat
        self.family = family
        self.weights = dict(cfg.weights or task.recipe)
        self._cfg, self._longest_s = cfg, 0.8 * timeout_s
        keys = Path(cfg.keys) if cfg.keys else None
        self._client = RewardClient(address, keys) if asks and address else None
        self._failures: Counter[str] = Counter()
        self._asked: dict[tuple[int, int], Prompt] = {}

    def submit(self, index: int, number: int, prompt: Prompt, completion: Completion) -> None:
        """Ask for the score of completion `number` of group `index`; returns at once, on all ranks."""
        self._ask((index, number), prompt, completion, self.weights, self.compat)

    def collect(self, groups: Sequence[Group]) -> list[Group]:
        """Wait for all scores; every rank of the model group returns the same scored groups."""
        return self._gather(groups, self.weights)

    def measure(self, groups: Sequence[Group]) -> list[Group]:
        """Score with the rewards that the task's metrics are made of, in the default mode; as `collect`."""
        recipe = dict.fromkeys(self.task.measured_by, 1.0)
        if not recipe:
            return [replace(group, scores=(Score(0.0),) * len(group.completions)) for group in groups]
        for i, group in enumerate(groups):
            for j, completion in enumerate(group.completions):
                self._ask((i, j), group.prompt, completion, recipe, "none")
        return self._gather(groups, recipe)

    def _ask(
        self,
        place: tuple[int, int],
        prompt: Prompt,
        completion: Completion,
        recipe: Mapping[str, float],
        compat: Compat,
    ) -> None:
        if self._client is not None:
            length = len(completion.token_ids)
            item = self.task.item(completion.text, prompt, compat, length, self.family)
            self._asked[place] = prompt
            self._client.submit("{}/{}".format(*place), item, self.task.weights(recipe, prompt))
            self._client.poll()

    def _gather(self, groups: Sequence[Group], recipe: Mapping[str, float]) -> list[Group]:
        scores: dict[tuple[int, int], Score] = {}
        if self._client is not None:
            # Every item may run into its deadline twice, as many at a time as there are workers.
            worst_s = 30.0 + 2 * self._cfg.deadline_s * -(-len(self._asked) // self._cfg.workers)
            ids = [f"{i}/{j}" for i, j in self._asked]
            found = self._client.collect(ids, min(worst_s, self._longest_s))
            scores = {
                place: self._named(found[name], prompt, recipe)
                for name, (place, prompt) in zip(ids, self._asked.items(), strict=True)
            }
            self._asked = {}
            self._log_failures(list(scores.values()))
        return self._shared(groups, scores, sorted(recipe))

    def first_failure(self, groups: Sequence[Group]) -> str:
        """Return the reason, the prompt and the text of the first failure that this rank knows of, or nothing."""
        for group in groups:
            for completion, score in zip(group.completions, group.scores, strict=True):
                if score.failure is not None and score.failure != _ELSEWHERE:
                    said = completion.text[:_QUOTED].encode("utf-8", "backslashreplace").decode()
                    return f"{score.failure}; of prompt {group.prompt.key!r}, which was answered {said!r}"
        return ""

    def answered(self) -> bool:
        """Return whether the service answers, on all ranks that ask; true where nothing is asked."""
        return self._client is None or self._client.alive(_ANSWER_S)

    def take_metrics(self) -> dict[str, float]:
        """Return `reward/latency_p50_s`, `reward/latency_p99_s` and `reward/queue_depth` of the slowest service, and
        `reward/failed/KIND`, the number of failures of each kind since the last call; all ranks call it.
        """
        found = self.stats()
        names = {"latency_p50_s", "latency_p99_s", "queue_depth"}
        slowest = reduce.maxima({name: float(found.get(name, 0.0)) for name in sorted(names)}, speaks=True)
        failed = reduce.sums({kind: float(self._failures[kind]) for kind in failures.KINDS}, speaks=True)
        self._failures.clear()
        out = {f"reward/{name}": value for name, value in slowest.items()}
        return out | {f"reward/failed/{kind}": count for kind, count in failed.items() if count}

    def stats(self) -> dict[str, Any]:
        """Return the service's figures where this rank asks it and is answered, else nothing."""
        try:
            return self._client.stats() if self._client is not None else {}
        except TimeoutError as error:  # it may be starting anew, and other ranks are in a collective
            logger.warning("no figures of the rewards: %s", error)
            return {}

    def close(self) -> None:
        """Disconnect."""
        if self._client is not None:
            self._client.close()

    def _named(self, score: Score, prompt: Prompt, recipe: Mapping[str, float]) -> Score:
        """Give the parts the recipe's names instead of the functions'."""
        if score.value is None:
            return score
        return replace(score, parts={name: score.parts[self.task.reward(name, prompt)] for name in recipe})

    def _log_failures(self, scores: list[Score]) -> None:
        reasons = Counter(s.failure for s in scores if s.failure is not None)
        self._failures.update(failures.kind(s.failure) for s in scores if s.failure is not None)
        for reason, count in reasons.most_common(3):
            logger.warning("reward failed for %d of %d completions: %s", count, len(scores), reason)

    def _shared(
        self, groups: Sequence[Group], scores: dict[tuple[int, int], Score], names: Sequence[str]
    ) -> list[Group]:
        """Give everyone's scores to the whole model group, as numbers: NaN is a failure."""
        places = [(i, j) for i, group in enumerate(groups) for j in range(len(group.completions))]
        # Exactly one rank asked for each completion: the others add zeros.
        table = torch.zeros(len(places), 1 + len(names), dtype=torch.float64)
        for row, place in zip(table, places, strict=True):
            if place in scores:
                score = scores[place]
                numbers = [score.value, *(score.parts[name] for name in names)] if score.value is not None else None
                row[:] = torch.tensor(numbers or float("nan"), dtype=torch.float64)
        if self.mesh.world > self.mesh.dp_size and len(table):
            shared = table.to(device.device())
            dist.all_reduce(shared, group=self.mesh.model_group)
            table = shared.cpu()
        rows = dict(zip(places, table.tolist(), strict=True))
        return [
            replace(
                group,
                scores=tuple(_score(rows[i, j], names, scores.get((i, j))) for j in range(len(group.completions))),
            )
            for i, group in enumerate(groups)
        ]


def _score(row: list[float], names: Sequence[str], own: Score | None) -> Score:
    value, *parts = row
    if value == value:
        return Score(value, dict(zip(names, parts, strict=True)))
    reason = own.failure if own is not None else None
    return Score(None, failure=reason or _ELSEWHERE)


@contextmanager
def judges(
    cfg: RewardsConfig,
    task: str,
    mesh: Mesh,
    asks: bool,
    log_dir: Path,
    timeout_s: float,
    model_type: str,
    serve: bool = True,
) -> Iterator[Judges]:
    """Start a reward service on each node's first rank and connect the ranks that ask to their own node's.

    With `rewards.address` they are connected to that one, and nothing is started. Without `serve` nothing is asked, for
    groups that have their scores already.

    Raises:
        ValueError: an unknown task or reward, settings that the service refuses, or no service at `rewards.address`.
    """
    tasks.check(task, cfg.weights)
    me = identity()
    local_rank = me.local_rank if me else 0
    address = (cfg.address or "") if serve else ""
    made: list[Judges] = []
    with ExitStack() as stack:

        def start() -> None:
            nonlocal address
            if serve and cfg.address is None and local_rank == 0:
                files = [Path(path) for path in tasks.files(task)]
                address = stack.enter_context(RewardService(cfg, log_dir, files)).address

        def connect() -> None:
            made.append(Judges(address, tasks.get(task), cfg, mesh, asks, timeout_s, _family(model_type)))
            stack.callback(made[0].close)

        distributed.together(start)  # one rank's wrong setting is told by all
        if cfg.address is None:
            address = distributed.from_node_leader(address, local_rank)
        distributed.together(connect)
        (asked,) = made
        problem = f"rewards.address: no service that knows our keys answers at {address} within {_ANSWER_S:g} s"
        distributed.agree("" if cfg.address is None or asked.answered() else problem, ValueError)
        yield asked


def _family(model_type: str) -> Family:
    """The family in the rewards' words of a model's `model_type`, such as glm of glm4v."""
    found: Family = next(family for family in get_args(Family) if model_type.startswith(family))
    return found
