"""Every reward on 10^5 drawn texts: a finite value or a failure, and no other exception. Minutes: its own command.

``python -m pytest -m slow tests/unit/test_rewards_fuzz.py``
"""

from __future__ import annotations

import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_vlmr1.rewards import functions
from megatron_vlmr1.rewards.item import RewardFailure, RewardItem

RANGES = {"length": (-0.5, 1.0), "repetition": (-1.0, 0.0)}
PUBLISHED = {"length": (0.5, 1.0), "iou": (-math.inf, math.inf), "weighted_sum": (-math.inf, math.inf)}
PUBLISHED |= dict.fromkeys(("map", "od_ap", "od_ap50", "odLength"), (-1.0, 1.0))
TRUTHS = (
    "[1, 2, 30, 40]",
    "<answer> 42 </answer>",
    "<answer> A </answer>",
    "yes",
    "$x^2$",
    '<answer> ```json\n[{"bbox_2d": [1, 2, 30, 40], "label": "a"}]\n``` </answer>',
    "<answer> None </answer>",
    "",
)
PIECES = st.sampled_from(
    (
        *("<think>", "</think>", "<answer>", "</answer>", "```json", "```", "[", "]", "{", "}", ",", ":", '"', "\\"),
        *('"bbox_2d"', '"label"', '"a"', "[1, 2, 30, 40]", "[30.5,-2,1,1e400]", "NaN", "Infinity", "null", "None"),
        *('[{"bbox_2d": [1, 2, 30, 40], "label": "a"}]', "\\boxed{", "\\frac{1}{2}", "$", "9**9**9", "^", "yes", "no"),
        *("(A)", "A.", "42", "4.2e1", "1,000", "three", "\n", "\r", " ", "\0", "\ud800", "\u202e", "\u0663", "a b c "),
    )
)
TEXTS = st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=14).map("".join))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=100_000, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(TEXTS, st.sampled_from(TRUTHS) | TEXTS, st.sampled_from(("none", "vlm-r1")), st.booleans())
def test_any_text(completion: str, solution: str, compat: str, tagged: bool) -> None:
    completion = f"<think>t</think><answer>{completion}</answer>" if tagged else completion
    item = RewardItem(completion, solution, (640, 480), (1, 34, 46), compat, num_tokens=7)  # type: ignore[arg-type]
    for name in functions.names():
        low, high = RANGES.get(name, (-1.0 if name in ("giou", "diou") else 0.0, 1.0))
        if compat == "vlm-r1":
            low, high = PUBLISHED.get(name, (low, high))
        try:
            value = functions.get(name)(item)
        except RewardFailure:
            continue
        assert type(value) is float and math.isfinite(value) and low <= value <= high, (name, value)
