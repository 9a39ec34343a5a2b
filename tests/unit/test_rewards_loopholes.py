"""What a policy that is trained on a reward would find out: each way around is closed."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_vlmr1.rewards import functions
from megatron_vlmr1.rewards.item import RewardFailure, RewardItem


def reward(name: str, completion: str, solution: str, **rest: Any) -> float:
    return functions.get(name)(RewardItem(completion, solution, **rest))


def said(text: str) -> str:
    return f"<think>t</think><answer>{text}</answer>"


def test_math_compares_every_one_of_several_equations() -> None:
    assert reward("math", said("x=3, y=2"), "x=3, y=2") == reward("math", said("x = 3, y = 2"), "x=3, y=2") == 1.0
    assert reward("math", said("x=9, y=2"), "x=3, y=2") == reward("math", said("2"), "x=3, y=2") == 0.0


def test_an_answer_that_is_too_hard_is_wrong_and_a_truth_is_nobodys_fault() -> None:
    assert reward("math", said("9**9**9**9"), "3") == 0.0
    with pytest.raises(RewardFailure, match="too_hard"):
        reward("math", said("3"), "9**9**9**9")
    with pytest.raises(RewardFailure, match="too_hard"):
        reward("math", said("9**9**9**9"), "3", compat="vlm-r1")


def test_repetition_looks_at_the_thoughts_beside_boxes() -> None:
    boxes = '<answer>[{"bbox_2d": [1, 2, 3, 4], "label": "a"}]</answer>'
    assert reward("repetition", f"<think>one thought only here it is</think>{boxes}", "") == 0.0
    assert reward("repetition", f"<think>{'the same old words again and ' * 9}</think>{boxes}", "") < -0.7
