"""Whether a completion is well formed and answers with json that holds a box. 1 or 0.

Mended in the default mode: nothing but white space may stand around the two blocks, the box must stand between the
braces of the one answer, its coordinates may be decimal or negative, and the time is linear in the text.

Families other than Qwen2.5-VL are not asked for json: InternVL's box needs no braces, neither published nor by default,
and GLM's published format needs no box at all.
"""

from __future__ import annotations

import re2

from megatron_vlmr1.rewards import answers
from megatron_vlmr1.rewards.answers import DIGIT, SPACE
from megatron_vlmr1.rewards.item import RewardItem, check_length

_NUMBERS = rf",{SPACE}*".join([f"{DIGIT}+"] * 4)
_THOUGHT = rf"<think>.*?</think>{SPACE}*"
_PUBLISHED = {
    "qwen2_5_vl": re2.compile(rf"(?s){_THOUGHT}<answer>.*?\{{.*\[{_NUMBERS}\].*\}}.*?</answer>"),
    "internvl": re2.compile(rf"(?s){_THOUGHT}<answer>.*?\[{_NUMBERS}\].*?</answer>"),
    "glm": re2.compile(r"(?s)<think>.*?<answer>.*?</answer>"),
}


def score(item: RewardItem) -> float:
    """Return 1.0 or 0.0.

    Raises:
        RewardFailure: too_long.
    """
    if item.compat == "vlm-r1":
        return float(_PUBLISHED[item.family].search(answers.encodable(item.completion)) is not None)
    check_length(item.completion)
    answer = answers.answer(item.completion)
    if answer is None or not answers.well_formed(item.completion):
        return 0.0
    inside = answer.partition("{")[2].rpartition("}")[0] if item.family == "qwen2_5_vl" else answer
    return float(answers.box(inside) is not None)
