"""The overlong penalty by hand, and what it adds to a group."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_vlmr1.grpo.shaping import overlong_penalty, with_overlong_penalty
from megatron_vlmr1.types import Completion, Group, Prompt, Score


def test_by_hand():
    lengths = np.array([1, 15, 16, 17, 18, 19, 20], np.int64)
    found = overlong_penalty(lengths, 20, 4)  # the expected length is 16
    assert found.dtype == np.float32
    assert found.tolist() == [0, 0, 0, -0.25, -0.5, -0.75, -1]
    published = overlong_penalty(np.array([16384, 18432, 20480]), 20480, 4096)  # DAPO, section 4.1
    assert published.tolist() == [0, -0.5, -1]


def group(lengths: list[int], values: list[float | None]) -> Group:
    ids = np.zeros(1, np.int64)
    prompt = Prompt(0, "k", ids, np.zeros((3, 1), np.int64), (), "", "")
    completions = tuple(Completion(np.zeros(n, np.int64), np.zeros(n, np.float32), "stop", "") for n in lengths)
    scores = tuple(Score(None, failure="late") if v is None else Score(v, {"iou": v}) for v in values)
    return Group(prompt, completions, scores)


def test_a_group():
    before = group([3, 9, 10, 10], [1.0, 1.0, 0.5, None])
    after = with_overlong_penalty(before, 10, 4)
    assert [score.value for score in after.scores] == pytest.approx([1.0, 0.25, -0.5, None])
    assert dict(after.scores[1].parts) == {"iou": 1.0, "overlong": -0.75}
    assert after.scores[3] == before.scores[3]  # a failure stays one
    assert after.completions is before.completions


def test_off():
    before = group([10], [1.0])
    assert with_overlong_penalty(before, 10, 0) is before
