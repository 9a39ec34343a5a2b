"""GRPO: sample groups, score them, compare within the group, update. Reads like the paper (arXiv 2504.07615)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

import numpy as np

from megatron_vlmr1.config import Config
from megatron_vlmr1.errors import STOPPED, RunStopped
from megatron_vlmr1.grpo.advantages import group_advantages, score_values
from megatron_vlmr1.grpo.update import GrpoUpdate
from megatron_vlmr1.parallel import reduce
from megatron_vlmr1.parallel.mesh import Mesh
from megatron_vlmr1.parallel.optimizer import learning_rate
from megatron_vlmr1.runtime.signals import StopFlag
from megatron_vlmr1.telemetry.samples import write_samples
from megatron_vlmr1.train.replay import replay, save_rollout
from megatron_vlmr1.train.run import Run, requeue
from megatron_vlmr1.train.work import even_out, work_metrics
from megatron_vlmr1.types import Group, Prompt


def train(cfg: Config, mesh: Mesh, stop: StopFlag) -> Run:
    """Run GRPO to `train.steps`, from the newest checkpoint of the run directory if it has one.

    Raises:
        ValueError: the user's input does not fit together.
        RunStopped: checkpointed on a signal (85), or stopped itself (17).
    """
    with ExitStack() as stack:
        run = Run(cfg, mesh, stop, stack)
        update = GrpoUpdate(run.updater, run.reference, run.timers)
        for step in range(run.step, cfg.train.steps):
            with run.timers("data"):
                prompts = [prompt for prompt, _ in run.feed.next(cfg.train.prompts_per_step)]
            with run.timers("rollout"):
                groups = replay(prompts, step, run) if run.replays else rollout(run, prompts)
            with run.timers("reward_exposed"):
                groups = with_advantages(groups if run.replays else run.judges.collect(groups))
            save_rollout(groups, step, run)
            metrics = score_metrics(groups, run) | work_metrics(groups, run)
            with run.timers("update"):
                if not cfg.debug.skip_update:
                    metrics |= update(even_out(groups, run), learning_rate(cfg.optimizer, step, cfg.train.steps))
            run.actor.policy.forget_features()
            save_samples(groups, step, run)
            if run.after_step(step, metrics):
                raise requeue(run)
        run.write_facts()
    return run


def rollout(run: Run, prompts: Sequence[Prompt]) -> list[Group]:
    """Sample G completions of each prompt; each goes to the reward processes as it ends."""
    cfg = run.cfg.rollout
    sampling = run.actor.sampling(cfg.max_new_tokens, cfg.temperature, seed=run.cfg.seed)
    completions = run.actor.engine.generate(
        prompts, cfg.num_generations, sampling, lambda i, j, c: run.judges.submit(i, j, prompts[i], c)
    )
    return [Group(prompt, group) for prompt, group in zip(prompts, completions, strict=True)]


def with_advantages(groups: Sequence[Group]) -> list[Group]:
    """Compare each completion with its group."""
    return [replace(group, advantages=group_advantages(score_values(group))) for group in groups]


def score_metrics(groups: Sequence[Group], run: Run) -> dict[str, float]:
    """Return `reward/*` and `rollout/*` over all ranks.

    Raises:
        RunStopped: too large a share of the scores failed (exit code 17).
    """
    names = sorted(run.judges.weights)
    sums = dict.fromkeys(("n", "scored", "value", "square", "length", "truncated", "zero_std", "groups", *names), 0.0)
    for group in groups:
        values = score_values(group)
        sums["groups"] += 1
        sums["zero_std"] += float(np.nanmax(values) == np.nanmin(values)) if np.isfinite(values).any() else 0.0
        for completion, score in zip(group.completions, group.scores, strict=True):
            sums["n"] += 1
            sums["length"] += len(completion.token_ids)
            sums["truncated"] += completion.finish_reason == "length"
            if score.value is not None:
                sums["scored"] += 1
                sums["value"] += score.value
                sums["square"] += score.value**2
                for name in names:
                    sums[name] += score.parts[name]
    sums = reduce.sums(sums | {"skipped": float(run.feed.skipped)}, run.mesh.is_model_leader)
    n, scored = max(1.0, sums["n"]), max(1.0, sums["scored"])
    failed = 1.0 - sums["scored"] / n if sums["n"] else 0.0
    if failed > run.cfg.rewards.max_failed_frac:
        reason = next((s.failure for g in groups for s in g.scores if s.failure), "see the logs of other ranks")
        raise RunStopped(STOPPED, f"{failed:.0%} of the scores of a step failed: {reason}")
    mean = sums["value"] / scored
    return {
        "reward/mean": mean,
        "reward/std": max(0.0, sums["square"] / scored - mean**2) ** 0.5,
        **{f"reward/{name}": sums[name] / scored for name in names},
        "reward/failed_frac": failed,
        "grpo/zero_std_groups": sums["zero_std"] / max(1.0, sums["groups"]),
        "rollout/length_mean": sums["length"] / n,
        "rollout/truncated_frac": sums["truncated"] / n,
        "rollout/tokens": sums["length"],
        "data/skipped": sums["skipped"],
    }


def save_samples(groups: Sequence[Group], step: int, run: Run) -> None:
    """Write the first rank's groups for people to read, every `train.sample_every` steps."""
    every = run.cfg.train.sample_every
    if run.mesh.rank != 0 or not every or step % every:
        return
    rows = []
    for group in groups:
        assert group.advantages is not None
        completions = [
            {
                "text": completion.text,
                "value": score.value,
                "parts": dict(score.parts),
                "failure": score.failure,
                "advantage": float(advantage) if np.isfinite(advantage) else None,
                "finish_reason": completion.finish_reason,
            }
            for completion, score, advantage in zip(group.completions, group.scores, group.advantages, strict=True)
        ]
        prompt = group.prompt
        rows.append({"key": prompt.key, "question": prompt.question, "truth": prompt.truth, "completions": completions})
    write_samples(run.run_dir, step, rows)
