"""Advantages against the published code's numbers, and by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from megatron_vlmr1.grpo.advantages import group_advantages, score_values
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


def test_score_values():
    ids = np.zeros(1, np.int64)
    completion = Completion(ids, np.zeros(1, np.float32), "stop", "")
    prompt = Prompt(0, "k", ids, np.zeros((3, 1), np.int64), (), "", "")
    group = Group(prompt, (completion,) * 3, (Score(0.0), Score(None, failure="deadline"), Score(1.5)))
    found = score_values(group)
    assert found.dtype == np.float32 and found.tolist() == pytest.approx([0.0, NAN, 1.5], nan_ok=True)
