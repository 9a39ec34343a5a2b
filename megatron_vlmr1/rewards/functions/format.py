"""Whether a completion is one think block and then one answer block. 1 or 0.

Mended in the default mode: white space around the blocks is fine, a second block of either kind is not, and the time
is linear in the text.
"""

from __future__ import annotations

import re2

from megatron_vlmr1.rewards import answers
from megatron_vlmr1.rewards.answers import SPACE
from megatron_vlmr1.rewards.item import RewardItem, check_length

_PUBLISHED = re2.compile(rf"(?s)<think>.*?</think>{SPACE}*<answer>.*?</answer>")


def score(item: RewardItem) -> float:
    """Return 1.0 or 0.0.

    Raises:
        RewardFailure: too_long.
    """
    if item.compat == "vlm-r1":
        return float(_PUBLISHED.fullmatch(answers.encodable(item.completion)) is not None)
    check_length(item.completion)
    return float(answers.well_formed(item.completion))
