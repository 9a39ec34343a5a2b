"""Each algorithm's losses and gradients on one rank or two, and twenty steps of it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_vlmr1.data.packing import MicroBatch
from megatron_vlmr1.grpo.advantages import score_values
from megatron_vlmr1.grpo.algorithms import ALGORITHMS
from megatron_vlmr1.grpo.update import GrpoUpdate, Loss, Metrics, Updater
from megatron_vlmr1.models.policy import Policy
from megatron_vlmr1.parallel import optimizer as parallel_optimizer
from megatron_vlmr1.parallel import reduce, schedule
from megatron_vlmr1.parallel.mesh import Mesh
from megatron_vlmr1.rollout.sampling import Sampling
from megatron_vlmr1.types import Group, Score
from tests.checkpoints import mixed_prompts
from tests.distributed import plain, work
from tests.distributed.ranks import layout

MAX_NEW_TOKENS = 8
CAP = 1.1
NUDGE = 2e-3  # std of what an optimizer step adds to the weights
CLIP = {"gspo": (0.01, 0.02)}  # of GSPO; the others' is (0.05, 0.1): all of them clip something
STEPS = 20


def cases() -> list[tuple[plain.Settings, int]]:
    """Settings, and how many optimizer steps are taken on the rollout."""
    out = []
    for name, beta, iterations in itertools.product(ALGORITHMS, (0.0, 0.04), (1, 2, 4)):
        out.append((_settings(name, beta, None), iterations))
    return out + [(_settings(name, 0.04, CAP), 2) for name in ALGORITHMS]


def _settings(name: str, beta: float, cap: float | None) -> plain.Settings:
    low, high = CLIP.get(name, (0.05, 0.1))
    return plain.Settings(name, low, high, beta, cap, MAX_NEW_TOKENS)


def label(run: plain.Settings, iterations: int) -> str:
    """Name a case."""
    return f"{run.algorithm}_{run.beta}_{run.cap}_{iterations}"


def scored_groups(root: Path) -> list[Group]:
    """Return the saved rollout with drawn scores, one of them failed, and log-probs that are off by some noise."""
    rng = np.random.default_rng(5)
    completions = work.read_completions(root / "rollout.json")
    groups = []
    for prompt in mixed_prompts(root / "policy"):
        if prompt.position not in completions:
            continue
        row = completions[prompt.position]
        noisy = [replace(c, logprobs=c.logprobs + rng.normal(0, 0.2, len(c.logprobs)).astype(np.float32)) for c in row]
        scores = [Score(float(value)) for value in rng.random(len(row)).astype(np.float32)]
        if prompt.position == 1:
            scores[1] = Score(None, failure="deadline")
        groups.append(Group(prompt, tuple(noisy), tuple(scores)))
    return groups


def save_rollout(root: Path, mesh: Mesh) -> None:
    """Sample completions of a text, of one image and of two images."""
    prompts = [mixed_prompts(root / "policy")[i] for i in (0, 1, 3)]
    engine = work.engine(work.load_policy(root / "policy", mesh))
    rows = engine.generate(prompts, 4, Sampling(MAX_NEW_TOKENS, work.STOPS, seed=1))
    work.write_completions(root / "rollout.json", prompts, rows)


class Nudge(work.Still):
    """In the optimizer's place: each step moves the weights a way of its own, whatever the gradient is."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self._parameters = list(policy.model.parameters())
        self._start = [p.detach().clone() for p in self._parameters]
        self.steps = 0

    @torch.no_grad()
    def step(self) -> tuple[bool, float, None]:
        """Add noise that depends on the number of the step."""
        generator = torch.Generator().manual_seed(self.steps)
        for parameter in self._parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=NUDGE)
        self.steps += 1
        return True, 0.0, None

    @torch.no_grad()
    def rewind(self) -> None:
        """Return to the first weights."""
        self.steps = 0
        for parameter, value in zip(self._parameters, self._start, strict=True):
            parameter.copy_(value)


class Recorder(Updater):
    """Keeps the loss of each iteration, and writes the gradients of the first two."""

    def __init__(self, policy: Policy, nudge: Nudge, cfg: Any, source: Path, target: Path) -> None:
        super().__init__(policy, nudge, cfg)  # type: ignore[arg-type]
        self._source, self._target = source, target
        self.losses: list[float] = []

    def step(self, batches: Sequence[MicroBatch], loss: Loss, lr: float) -> tuple[list[schedule.Result], Metrics]:
        """As `Updater.step`."""
        results, metrics = super().step(batches, loss, lr)
        mesh = self.policy.mesh
        sums = reduce.sums({"loss": sum(float(r["loss"]) for r in results)}, mesh.is_last_stage and mesh.tp_rank == 0)
        if len(self.losses) < 2:
            work.write_gradients(self.policy, self._source, self._target / str(len(self.losses)))
        self.losses.append(sums["loss"])
        return results, metrics


def run_cases(root: Path, name: str, mesh: Mesh, chosen: list[tuple[plain.Settings, int]], mine: slice) -> None:
    """Update with each of the cases; `mine` are this rank's groups. Results under ``root/name``."""
    source, out = root / "policy", root / name
    policy, reference = work.with_reference(source, root / "reference", mesh)
    policy.wrap_for_training()
    nudge = Nudge(policy)
    found = {}
    for run, iterations in chosen:
        nudge.rewind()
        groups = [
            replace(group, advantages=ALGORITHMS[run.algorithm].advantages(score_values(group)))
            for group in scored_groups(root)[mine]
        ]
        grpo = {"algorithm": run.algorithm, "epsilon_low": run.low, "epsilon_high": run.high, "beta": run.beta}
        grpo |= {"num_iterations": iterations, "truncated_importance": run.cap}
        cfg = work.settings(work.SMALL, grpo=grpo, rollout={"max_new_tokens": run.max_new_tokens})
        recorder = Recorder(policy, nudge, cfg, source, out / label(run, iterations))
        metrics = GrpoUpdate(recorder, reference if run.beta else None)(groups, 0.0)
        found[label(run, iterations)] = {"losses": recorder.losses, "metrics": metrics}
    if mesh.rank == 0:
        (out / "found.json").write_text(json.dumps(found))


def nudged_weights(root: Path, mesh: Mesh) -> None:
    """Write the weights before each of four iterations."""
    policy = work.load_policy(root / "policy", mesh)
    nudge = Nudge(policy)
    for iteration in range(4):
        work.write_weights(policy, root / "policy", root / f"weights_{iteration}")
        nudge.step()


def alone(root: Path, mesh: Mesh) -> None:
    """All cases in one process."""
    save_rollout(root, mesh)
    nudged_weights(root, mesh)
    run_cases(root, "one", mesh, cases(), slice(None))


def pair(root: Path) -> None:
    """On two data-parallel ranks: gradients of unevenly spread groups, then twenty steps of each algorithm."""
    with layout("dp2") as mesh:
        once = [(run, n) for run, n in cases() if run.cap is not None]
        run_cases(root, "uneven", mesh, once, slice(0, 1) if mesh.rank == 0 else slice(1, None))
        run_cases(root, "empty", mesh, once, slice(None) if mesh.rank == 0 else slice(0, 0))
        courses = {name: twenty_steps(root, name, mesh) for name in ALGORITHMS}
        if mesh.rank == 0:
            (root / "courses.json").write_text(json.dumps(courses))


def twenty_steps(root: Path, name: str, mesh: Mesh) -> list[dict[str, float]]:
    """Learn to say tokens of small number, two optimizer steps on each rollout; the metrics of each step."""
    policy, reference = work.with_reference(root / "policy", root / "reference", mesh, freeze_vision=True)
    grpo = {"algorithm": name, "beta": 0.001, "num_iterations": 2, "truncated_importance": 2.0}
    cfg = work.settings(grpo=grpo, rollout={"max_new_tokens": MAX_NEW_TOKENS})
    optimizer = parallel_optimizer.build(cfg.optimizer, policy.wrap_for_training())
    update = GrpoUpdate(Updater(policy, optimizer, cfg), reference)
    engine, rows = work.engine(policy), []
    prompts = work.share([mixed_prompts(root / "policy")[i] for i in (0, 1, 2, 5)], mesh)
    for step in range(STEPS):
        groups = []
        completions = engine.generate(prompts, 4, Sampling(MAX_NEW_TOKENS, work.STOPS, seed=step))
        for prompt, row in zip(prompts, completions, strict=True):
            values = np.array([1 - c.token_ids.mean() / 512 for c in row], np.float32)
            groups.append(Group(prompt, row, (), ALGORITHMS[name].advantages(values)))
        rewards = [1 - float(c.token_ids.mean()) / 512 for group in groups for c in group.completions]
        mean = reduce.sums({"reward": sum(rewards), "n": len(rewards)}, mesh.is_model_leader)
        rows.append(update(groups, 3e-3) | {"reward": mean["reward"] / mean["n"]})
    return rows
