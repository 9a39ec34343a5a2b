"""Saved rollouts: written by some ranks, read by any; damage is one clear line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_vlmr1 import config
from megatron_vlmr1.data.codec import to_bytes
from megatron_vlmr1.data.rollouts import read_rollout, with_prompts, write_rollout
from megatron_vlmr1.types import Completion, Group, Prompt, Score
from tests.checkpoints import random_image


def group(position: int) -> Group:
    ids = np.arange(5) + position
    prompt = Prompt(position, f"k{position}", ids, np.stack([ids] * 3), (random_image(position, 4, 4),), "?", "[1]")
    completions = tuple(
        Completion(np.arange(1 + i), np.full(1 + i, -0.1 * position, np.float32), "stop", "x") for i in range(2)
    )
    scores = (Score(0.5, {"iou": 0.5}), Score(None, failure="deadline"))
    return Group(prompt, completions, scores, np.array([1.0, np.nan], np.float32))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for rank in range(2):
        write_rollout(tmp_path, 3, rank, 2, [group(rank), group(2 + rank)], 40)
    return tmp_path


def test_any_rank_finds_its_prompts(folder: Path):
    saved = read_rollout(folder, 3)
    assert sorted(saved) == [0, 1, 2, 3]
    for positions in ([0, 2], [3, 1, 0, 2], []):
        found = with_prompts(saved, [group(p).prompt for p in positions])
        assert [g.prompt.position for g in found] == positions
        for g in found:
            whole = group(g.prompt.position)
            assert (g.prompt.images[0].patches == whole.prompt.images[0].patches).all()  # the stream's own
            assert g.scores == whole.scores and g.advantages is None
            for mine, theirs in zip(g.completions, whole.completions, strict=True):
                assert mine.token_ids.tolist() == theirs.token_ids.tolist()
                assert mine.logprobs.tobytes() == theirs.logprobs.tobytes()
    assert sum(path.stat().st_size for path in folder.rglob("*.msgpack")) < 4 * 4000  # no pixels


def test_a_file_of_an_earlier_and_larger_job_is_not_read(folder: Path):
    write_rollout(folder, 3, 0, 1, [group(7)], 0)
    assert sorted(read_rollout(folder, 3)) == [7]


def test_another_prompt_at_the_same_position(folder: Path):
    saved = read_rollout(folder, 3)
    other = replace(group(1).prompt, token_ids=np.arange(5) + 9)
    for prompt in (other, group(8).prompt):
        with pytest.raises(ValueError, match=rf"position {prompt.position} of the data .* the same data, seed"):
            with_prompts(saved, [prompt])


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (None, "rank_1.msgpack: No such file"),
        (b"", "rank_1.msgpack: "),
        (to_bytes([1]), "rank_1.msgpack: not a rollout"),
        (to_bytes({"ranks": 2, "groups": [replace(group(0), scores=())]}), "rank_1.msgpack: not a rollout"),
        (to_bytes({"ranks": "2", "groups": []}), "rank_1.msgpack: not a rollout"),
    ],
)
def test_damage_is_one_line(folder: Path, data: bytes | None, says: str):
    path = folder / "step_3" / "rank_1.msgpack"
    path.unlink() if data is None else path.write_bytes(data)
    with pytest.raises(ValueError, match=says) as raised:
        read_rollout(folder, 3)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"method": "sft", "debug": {"skip_update": True}}, "it needs method=grpo"),
        ({"debug": {"replay_rollouts": "x"}, "train": {"evaluate_every": 2}}, "it needs train.evaluate_every=0"),
    ],
)
def test_settings_that_do_not_fit(sections: dict[str, object], says: str):
    with pytest.raises(ValueError, match=says):
        config.parse({"model": {"path": "-"}, "data": {"train": "-"}, **sections}, "test")
