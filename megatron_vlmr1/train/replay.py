"""Rollouts saved, and taken from where they were saved instead of generated (config section `debug`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_vlmr1.data.rollouts import read_rollout, with_prompts, write_rollout
from megatron_vlmr1.train.run import Run
from megatron_vlmr1.types import Group, Prompt


def save_rollout(groups: Sequence[Group], step: int, run: Run) -> None:
    """Write a step's scored groups, where the config asks for it."""
    mesh = run.mesh
    if run.cfg.debug.save_rollouts and mesh.is_model_leader:
        write_rollout(run.run_dir / "rollouts", step, mesh.dp_rank, mesh.dp_size, groups)


def replay(prompts: Sequence[Prompt], step: int, run: Run) -> list[Group]:
    """Return the saved groups of these prompts, scores included.

    Raises:
        ValueError: the saved rollout is not of these prompts, is damaged, or lacks a reward that is weighed.
    """
    folder = run.cfg.debug.replay_rollouts
    assert folder is not None
    groups = with_prompts(read_rollout(Path(folder), step), prompts)
    for score in (score for group in groups for score in group.scores):
        if score.value is not None and (missing := run.judges.weights.keys() - score.parts.keys()):
            raise ValueError(f"debug.replay_rollouts={folder} was scored without {', '.join(sorted(missing))}")
    return groups
