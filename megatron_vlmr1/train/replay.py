"""Rollouts saved, and taken from where they were saved instead of generated (config section `debug`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_vlmr1.data.rollouts import read_rollout, with_prompts, write_rollout
from megatron_vlmr1.train.run import Run
from megatron_vlmr1.types import Group, Prompt, Score


def save_rollout(groups: Sequence[Group], first: int, step: int, run: Run) -> None:
    """Write the scored groups of a step that began at position `first`, where the config asks for it."""
    mesh = run.mesh
    if run.cfg.debug.save_rollouts and mesh.is_model_leader:
        write_rollout(run.run_dir / "rollouts", step, mesh.dp_rank, mesh.dp_size, groups, first)


def replay(prompts: Sequence[Prompt], step: int, run: Run) -> list[Group]:
    """Return the saved groups of these prompts, their rewards weighed as this run weighs them.

    Raises:
        ValueError: the saved rollout is not of these prompts, is damaged, or lacks a reward that is weighed.
    """
    folder = run.cfg.debug.replay_rollouts
    assert folder is not None
    groups = with_prompts(read_rollout(Path(folder), step), prompts)
    try:
        return [replace(g, scores=tuple(_weighed(score, run.judges.weights) for score in g.scores)) for g in groups]
    except KeyError as error:
        raise ValueError(f"debug.replay_rollouts={folder} was scored without {error.args[0]}") from error


def _weighed(score: Score, weights: Mapping[str, float]) -> Score:
    """Weigh the parts of a score anew; a penalty that was added to it is not among them."""
    if score.value is None:
        return score
    parts = {name: score.parts[name] for name in weights}
    return Score(sum(weight * parts[name] for name, weight in weights.items()), parts)
