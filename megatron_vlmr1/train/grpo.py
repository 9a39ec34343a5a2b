"""GRPO: sample groups, score them, compare within the group, update. Reads like the paper (arXiv 2504.07615)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

from megatron_vlmr1.config import Config
from megatron_vlmr1.grpo.advantages import score_values
from megatron_vlmr1.grpo.algorithms import ALGORITHMS
from megatron_vlmr1.grpo.dynamic_sampling import Batch
from megatron_vlmr1.grpo.shaping import with_overlong_penalty
from megatron_vlmr1.grpo.update import GrpoUpdate
from megatron_vlmr1.parallel.mesh import Mesh
from megatron_vlmr1.parallel.optimizer import learning_rate
from megatron_vlmr1.runtime.signals import StopFlag
from megatron_vlmr1.train.bad_batches import kept_if_bad
from megatron_vlmr1.train.replay import replay, save_rollout
from megatron_vlmr1.train.run import Run, requeue
from megatron_vlmr1.train.scores import save_samples, score_metrics
from megatron_vlmr1.train.work import even_out, work_metrics
from megatron_vlmr1.types import Group, Prompt


def train(cfg: Config, mesh: Mesh, stop: StopFlag, allow_config_change: bool = False) -> Run:
    """Run GRPO to `train.steps`, from the newest checkpoint of the run directory if it has one.

    Raises:
        ValueError: the user's input does not fit together.
        RunStopped: checkpointed on a signal (85), or stopped itself (17).
    """
    with ExitStack() as stack:
        run = Run(cfg, mesh, stop, stack, allow_config_change)
        update = GrpoUpdate(run.updater, run.reference, run.timers)
        for step in range(run.step, cfg.train.steps):
            batch = Batch(cfg.train.prompts_per_step, cfg.grpo.dynamic_sampling_rounds, run.feed.consumed)
            while batch.wants_more:
                with run.timers("data"):
                    run.updater.offload.before_generation()
                    prompts = [prompt for prompt, _ in run.feed.next(cfg.train.prompts_per_step)]
                with run.timers("rollout"):
                    groups = replay(prompts, step, run) if run.replays else rollout(run, prompts)
                with run.timers("reward_exposed"):
                    groups = with_advantages(groups if run.replays else run.judges.collect(groups), cfg)
                batch.add(groups)
            run.actor.engine.release()
            save_rollout(batch.drawn, batch.first, step, run)
            metrics = score_metrics(batch.drawn, run) | work_metrics(batch.drawn, batch.kept, run)
            metrics["grpo/rounds"] = batch.rounds
            with run.timers("update"), kept_if_bad(run, step, batch.first, batch.drawn):
                if not cfg.debug.skip_update:
                    metrics |= update(even_out(batch.kept, run), learning_rate(cfg.optimizer, step, cfg.train.steps))
            run.actor.policy.forget_features()
            save_samples(batch.drawn, step, run)
            if run.after_step(step, metrics):
                raise requeue(run)
        run.write_facts()
    return run


def rollout(run: Run, prompts: Sequence[Prompt]) -> list[Group]:
    """Sample G completions of each prompt; each goes to the reward processes as it ends."""
    cfg = run.cfg.rollout
    sampling = run.actor.sampling(run.cfg.seed)
    completions = run.actor.engine.generate(
        prompts, cfg.num_generations, sampling, lambda i, j, c: run.judges.submit(i, j, prompts[i], c)
    )
    return [Group(prompt, group) for prompt, group in zip(prompts, completions, strict=True)]


def with_advantages(groups: Sequence[Group], cfg: Config) -> list[Group]:
    """Shape the scores, then compare each completion with its group."""
    compare = ALGORITHMS[cfg.grpo.algorithm].advantages
    shaped = [with_overlong_penalty(g, cfg.rollout.max_new_tokens, cfg.grpo.overlong_buffer_tokens) for g in groups]
    return [replace(group, advantages=compare(score_values(group))) for group in shaped]
