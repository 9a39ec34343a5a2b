"""Supervised fine-tuning on the rows' own answers: the base of the shipped model, and GRPO's contrast."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
import torch.distributed as dist

from megatron_vlmr1.config import Config
from megatron_vlmr1.data.packing import MicroBatch, PackedGroup
from megatron_vlmr1.data.tokens import completion_ids
from megatron_vlmr1.grpo.update import Loss, label_tensors
from megatron_vlmr1.parallel import reduce
from megatron_vlmr1.parallel.mesh import Mesh
from megatron_vlmr1.parallel.optimizer import learning_rate
from megatron_vlmr1.parallel.schedule import Result
from megatron_vlmr1.runtime import device
from megatron_vlmr1.runtime.signals import StopFlag
from megatron_vlmr1.train.bad_batches import kept_if_bad
from megatron_vlmr1.train.run import Run, requeue
from megatron_vlmr1.train.work import even_out, work_metrics
from megatron_vlmr1.types import Prompt, Sample


def train(cfg: Config, mesh: Mesh, stop: StopFlag, allow_config_change: bool = False) -> Run:
    """Run SFT to `train.steps`, from the newest checkpoint of the run directory if it has one.

    Raises:
        ValueError: the user's input does not fit together.
        RunStopped: checkpointed on a signal (85), or stopped itself (17).
    """
    with ExitStack() as stack:
        run = Run(cfg, mesh, stop, stack, allow_config_change)
        for step in range(run.step, cfg.train.steps):
            with run.timers("data"):
                groups = packed(run, run.feed.next(cfg.train.prompts_per_step))
            with run.timers("update"), kept_if_bad(run, step):
                batches = run.updater.micro_batches(even_out(groups, run))
                lr = learning_rate(cfg.optimizer, step, cfg.train.steps)
                results, metrics = _update(batches, lr, run)
            run.actor.policy.forget_features()
            speaks = mesh.is_last_stage and mesh.tp_rank == 0
            sums = reduce.sums({k: sum(float(r[k]) for r in results) for k in ("loss", "tokens")}, speaks)
            losses = {"data/skipped": run.feed.skipped, "data/ledger_unwritten": run.feed.unwritten}
            skipped = reduce.sums(losses, mesh.is_model_leader)
            metrics |= {"train/loss": sums["loss"], "train/tokens": sums["tokens"], **skipped}
            metrics |= work_metrics(groups, groups, run)
            if run.after_step(step, metrics):
                raise requeue(run)
    return run


def packed(run: Run, batch: Sequence[tuple[Prompt, Sample]]) -> list[PackedGroup]:
    """Put each row's answer behind its prompt: its ``completion`` where it has one, else its solution.

    Raises:
        ValueError: a row's completion is not text.
    """
    groups = []
    for slot, (prompt, sample) in enumerate(batch):
        text = sample.extra.get("completion", sample.solution)
        if not isinstance(text, str):
            raise ValueError(f"{sample.key}: completion must be text")
        groups.append(PackedGroup(prompt, (completion_ids(run.actor.tokenizer, text, run.actor.stop_ids[0]),), (slot,)))
    return groups


def _update(batches: Sequence[MicroBatch], lr: float, run: Run) -> tuple[list[Result], dict[str, float]]:
    """Take a step; none where all samples were damaged: Adam's momentum would move the weights without evidence."""
    total = torch.tensor(float(sum(len(batch.label_ids) for batch in batches)), device=device.device())
    dist.all_reduce(total, group=run.mesh.dp_group)
    if not total:
        return [], {"train/grad_norm": 0.0, "train/lr": lr, "train/skipped": 1.0}
    return run.updater.step(batches, token_mean_loss(run, float(total)), lr)


def token_mean_loss(run: Run, tokens: float) -> Loss:
    """Return the loss -log p averaged over `tokens`: all completion tokens of the step, on all data-parallel ranks."""

    def loss(hidden: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, Result]:
        logprobs, _ = run.actor.policy.logprobs(hidden, *label_tensors(batch))
        value = -logprobs.sum() / tokens
        return value, {"loss": value.detach(), "tokens": torch.tensor(float(len(logprobs)))}

    return loss
