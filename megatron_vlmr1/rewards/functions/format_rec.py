"""Whether a completion is well formed and answers with json that holds a box. 1 or 0.

Mended in the default mode: nothing but white space may stand around the two blocks, the box must stand between the
braces of the one answer, its coordinates may be decimal or negative, and the time is linear in the text.
"""

from __future__ import annotations

import re2

from megatron_vlmr1.rewards import answers
from megatron_vlmr1.rewards.answers import DIGIT, SPACE
from megatron_vlmr1.rewards.item import RewardItem, check_length

_NUMBERS = rf",{SPACE}*".join([f"{DIGIT}+"] * 4)
_PUBLISHED = re2.compile(
    rf"(?s)<think>.*?</think>{SPACE}*<answer>.*?\{{.*\[{_NUMBERS}\].*\}}.*?</answer>",
)


def score(item: RewardItem) -> float:
    """Return 1.0 or 0.0.

    Raises:
        RewardFailure: too_long.
    """
    if item.compat == "vlm-r1":
        return float(_PUBLISHED.search(answers.encodable(item.completion)) is not None)
    check_length(item.completion)
    answer = answers.answer(item.completion)
    if answer is None or not answers.well_formed(item.completion):
        return 0.0
    inside = answer.partition("{")[2].rpartition("}")[0]
    return float(answers.box(inside) is not None)
