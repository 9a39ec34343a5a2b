"""Advantages against the published code's numbers, and by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from megatron_vlmr1.grpo.advantages import (
    centred_advantages,
    group_advantages,
    leave_one_out_advantages,
    score_values,
    scores_differ,
)
from megatron_vlmr1.types import Completion, Group, Prompt, Score

CASES = json.loads((Path(__file__).parent / "data" / "grpo_cases.json").read_text())["cases"]
NAN = math.nan


def advantages(*values: float) -> list[float]:
    return group_advantages(np.array(values, dtype=np.float32)).tolist()


@pytest.mark.parametrize("case", [c for c in CASES if c["function"] == "group_advantage"])
def test_published(case):
    size = case["inputs"]["num_generations"]
    rewards = np.array(case["inputs"]["rewards"], np.float32).reshape(-1, size)
    found = np.concatenate([group_advantages(row) for row in rewards])
    assert found.dtype == np.float32
    assert np.abs(found - case["expected"]).max() <= 1e-6


def test_a_failed_score_is_left_out_of_mean_and_deviation():
    std = math.sqrt(0.5)  # of 1 and 0, unbiased
    assert advantages(1, NAN, 0) == pytest.approx([0.5 / (std + 1e-4), NAN, -0.5 / (std + 1e-4)], abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("values", [(NAN, 1.0, NAN), (NAN, NAN), (1.0,), (math.inf, 1.0)])
def test_nothing_to_compare(values):
    assert all(map(math.isnan, advantages(*values)))


def test_equal_scores():
    assert advantages(0.7, 0.7, 0.7) == [0, 0, 0]
    assert advantages(0.7, 0.7, NAN) == pytest.approx([0, 0, NAN], nan_ok=True)


def test_they_are_centred_and_of_unit_deviation():
    values = np.random.default_rng(0).random(64).astype(np.float32)
    found = group_advantages(values)
    assert abs(found.mean()) < 1e-6 and found.std(ddof=1) == pytest.approx(1, abs=1e-3)
    assert (np.argsort(found) == np.argsort(values)).all()


@pytest.mark.parametrize("function", [group_advantages, centred_advantages, leave_one_out_advantages])
@pytest.mark.parametrize("values", [(NAN, 1.0, NAN), (NAN, NAN), (1.0,), (math.inf, 1.0)])
def test_nothing_to_compare_in_any_of_them(function, values):
    assert np.isnan(function(np.array(values, np.float32))).all()


def test_centred():
    found = centred_advantages(np.array([1, NAN, 0, 0.5, 0.1], np.float32))  # mean .4
    assert found.dtype == np.float32
    assert found.tolist() == pytest.approx([0.6, NAN, -0.4, 0.1, -0.3], abs=1e-6, nan_ok=True)


def test_leave_one_out():
    found = leave_one_out_advantages(np.array([1, NAN, 0, 0.5, 0.1], np.float32))
    others = [0.6 / 3, 1.6 / 3, 1.1 / 3, 1.5 / 3]  # means of the other three
    expected = [1 - others[0], NAN, 0 - others[1], 0.5 - others[2], 0.1 - others[3]]
    assert found.dtype == np.float32 and found.tolist() == pytest.approx(expected, abs=1e-6, nan_ok=True)


def scored(*values: float | None) -> Group:
    ids = np.zeros(1, np.int64)
    completion = Completion(ids, np.zeros(1, np.float32), "stop", "")
    prompt = Prompt(0, "k", ids, np.zeros((3, 1), np.int64), (), "", "")
    scores = tuple(Score(None, failure="deadline") if v is None else Score(v) for v in values)
    return Group(prompt, (completion,) * len(values), scores)


@pytest.mark.parametrize(
    ("values", "differ"),
    [
        ((0.0, 1.0), True),
        ((0.5, None, 0.5, 0.25), True),
        ((0.5, 0.5, 0.5), False),
        ((0.5, None, 0.5), False),
        ((1.0, None), False),
        ((None, None), False),
        ((), False),
    ],
)
def test_scores_differ(values, differ):
    assert scores_differ(scored(*values)) is differ


def test_score_values():
    found = score_values(scored(0.0, None, 1.5))
    assert found.dtype == np.float32 and found.tolist() == pytest.approx([0.0, NAN, 1.5], nan_ok=True)


def test_the_cases_are_all_of_the_published_ones():
    functions = [case["function"] for case in CASES]
    counts = {name: functions.count(name) for name in functions}
    assert counts == {"group_advantage": 3, "completion_mask": 1, "grpo_loss": 3, "per_token_logps": 1}
