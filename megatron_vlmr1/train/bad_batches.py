"""Batches whose step was not finite: kept, with the command that replays them."""

from __future__ import annotations

import logging
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_vlmr1.data.rollouts import write_rollout
from megatron_vlmr1.train.run import Run
from megatron_vlmr1.types import Group

logger = logging.getLogger(__name__)

_MAX_KEPT = 8  # batches, the newest ones


@contextmanager
def kept_if_bad(run: Run, step: int, first: int = 0, groups: Sequence[Group] | None = None) -> Iterator[None]:
    """Keep the batch of the update in the block if that was not finite, also where it ends the run.

    Args:
        run: all ranks of it call this.
        step: counted from 0.
        first: position in the data order at which the step began.
        groups: this rank's scored groups, written to ``run_dir/bad_batches/step_N`` as saved rollouts are; None where
            the batch is a function of data, seed and step, as in SFT.
    """
    before = run.updater.not_finite
    try:
        yield
    finally:
        if run.updater.not_finite > before:
            _keep(run, step, first, groups)


def _keep(run: Run, step: int, first: int, groups: Sequence[Group] | None) -> None:
    folder, mesh = run.run_dir / "bad_batches", run.mesh
    try:
        if groups is not None and mesh.is_model_leader:
            write_rollout(folder, step, mesh.dp_rank, mesh.dp_size, groups, first)
        if mesh.rank == 0:
            _prune(folder)
            base, command = replay_command(run, step, groups is not None)
            logger.error(
                "step %d was not finite and skipped; to replay it on the weights of %s: %s", step + 1, base, command
            )
    except OSError as error:  # no reason to lose the run
        logger.error("step %d was not finite and skipped; its batch is not kept: %s", step + 1, error)


def _prune(folder: Path) -> None:
    kept = sorted(folder.glob("step_*"), key=lambda path: int(path.name.removeprefix("step_")))
    for path in kept[:-_MAX_KEPT]:
        shutil.rmtree(path)


def replay_command(run: Run, step: int, rollouts: bool) -> tuple[str, str]:
    """Return the newest weights that there are, and the command that takes one step of the same batch from there."""
    cfg, run_dir = run.cfg, run.run_dir
    saved = run.checkpoints.store.steps()
    base = str(run.checkpoints.store.path(max(saved))) if saved else cfg.model.path
    settings = {
        "run_dir": f"{run_dir}/bad_batches/replay_{step}",
        "model.path": base,
        "debug.first_step": step,
        "train.steps": step + 1,
        "train.evaluate_every": 0,
    }
    if rollouts:
        settings["debug.replay_rollouts"] = f"{run_dir}/bad_batches"
    if cfg.method == "grpo" and cfg.grpo.beta:
        settings["model.reference_path"] = cfg.model.reference_path or cfg.model.path
    if cfg.train.keep_best is not None:  # of what may not be measured now
        settings["train.keep_best"] = "null"
    if cfg.telemetry.wandb_project:
        settings["telemetry.wandb_project"] = "null"
    words = ["vlmr1", "train", f"{run_dir}/config.yaml", "--nproc", str(run.mesh.world)]
    return base, shlex.join([*words, *(f"{key}={value}" for key, value in settings.items())])
