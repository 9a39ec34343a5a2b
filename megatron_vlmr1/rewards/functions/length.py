"""How short a right answer is, by a cosine of its length (arXiv 2502.03373, section 4). Range [-0.5, 1].

An answer is right where its reward is at least CORRECT: `weighted_sum` where the truth has labelled boxes, `iou` where
it is a box, else `default`.

Mended in the default mode:
- it matters whether the answer is right: a wrong one earns less than nothing, the longer the less so;
- the value stays where it is beyond MAX_TOKENS, instead of rising again.
"""

from __future__ import annotations

import math

from megatron_vlmr1.rewards import answers, functions
from megatron_vlmr1.rewards.item import RewardFailure, RewardItem

MAX_TOKENS = 1024
CORRECT = 0.7


def score(item: RewardItem) -> float:
    """Return 1 to 0.5 for right answers of no to MAX_TOKENS tokens, -0.5 to 0 for wrong ones; published: 1 to 0.5.

    Raises:
        RewardFailure: the item has no `num_tokens`, or the reward that says what is right fails.
    """
    if item.num_tokens is None:
        raise RewardFailure("the length reward needs num_tokens")
    if item.compat == "vlm-r1":
        return _between(1.0, 0.5, item.num_tokens)
    ends = (1.0, 0.5) if functions.get(_judge(item.solution))(item) >= CORRECT else (-0.5, 0.0)
    return _between(*ends, min(item.num_tokens, MAX_TOKENS))


def _judge(solution: str) -> str:
    if "bbox_2d" in solution and "label" in solution:
        return "weighted_sum"
    return "default" if answers.box(solution) is None else "iou"


def _between(shortest: float, longest: float, tokens: int) -> float:
    return shortest - (shortest - longest) * (1 - math.cos(tokens * math.pi / MAX_TOKENS)) / 2
