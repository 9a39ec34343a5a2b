"""Saved rollouts: each step's completions and scores, without the pixels, which the data stream gives again.

``FOLDER/step_N/rank_R.msgpack`` holds the groups of data-parallel rank R. A prompt is known by its position in the data
order, so a rollout can be read on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_vlmr1.data.codec import from_bytes, to_bytes
from megatron_vlmr1.telemetry.files import write_atomic
from megatron_vlmr1.types import Group, Prompt


def write_rollout(folder: Path, step: int, rank: int, ranks: int, groups: Sequence[Group], first: int) -> None:
    """Write the groups of data-parallel rank `rank` of `ranks`; one rank of each copy of the model calls it.

    `first` is the position in the data order at which the step began.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    bare = [replace(g, prompt=replace(g.prompt, images=()), advantages=None) for g in groups]
    write_atomic(_path(folder, step, rank), to_bytes({"ranks": ranks, "first": first, "groups": bare}))


def read_rollout(folder: Path, step: int) -> dict[int, Group]:
    """Return the groups of all ranks by the positions of their prompts, which have no images.

    Raises:
        ValueError: a file is missing or is no rollout.
    """
    groups: list[Group] = []
    rank, ranks = 0, 1
    while rank < ranks:
        ranks, _, more = _read(_path(folder, step, rank))
        groups += more
        rank += 1
    return {group.prompt.position: group for group in groups}


def first_position(folder: Path, step: int) -> int:
    """Return the position in the data order at which the step of a saved rollout began.

    Raises:
        ValueError: there is no such rollout.
    """
    return _read(_path(folder, step, 0))[1]


def with_prompts(saved: dict[int, Group], prompts: Sequence[Prompt]) -> list[Group]:
    """Return the saved groups of `prompts`, with these prompts in them.

    Raises:
        ValueError: one is not among them, or was another prompt.
    """
    groups = []
    for prompt in prompts:
        group = saved.get(prompt.position)
        if group is None or not np.array_equal(group.prompt.token_ids, prompt.token_ids):
            raise ValueError(
                f"debug.replay_rollouts: position {prompt.position} of the data ({prompt.key}) is not what the rollout "
                "was made of: it needs the same data, seed and prompts per step"
            )
        groups.append(replace(group, prompt=prompt))
    return groups


def _path(folder: Path, step: int, rank: int) -> Path:
    return folder / f"step_{step}" / f"rank_{rank}.msgpack"


def _read(path: Path) -> tuple[int, int, tuple[Group, ...]]:
    try:
        found = from_bytes(path.read_bytes())
    except OSError as error:
        raise ValueError(f"debug.replay_rollouts: {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"debug.replay_rollouts: {path}: {error}") from error
    ranks, first, groups = map((found if isinstance(found, dict) else {}).get, ("ranks", "first", "groups"))
    if (
        type(ranks) is not int
        or type(first) is not int
        or first < 0
        or not isinstance(groups, tuple)
        or not all(map(_whole, groups))
    ):
        raise ValueError(f"debug.replay_rollouts: {path}: not a rollout")
    return ranks, first, groups


def _whole(group: object) -> bool:
    return (
        isinstance(group, Group)
        and len(group.completions) == len(group.scores)
        and all(len(c.token_ids) == len(c.logprobs) > 0 for c in group.completions)
    )
