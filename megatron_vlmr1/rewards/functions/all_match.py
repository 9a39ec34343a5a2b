"""Whether the answer is the truth, but for case, spacing and full stops at the end. 1 or 0.

Mended in the default mode:
- only an answer block counts, the first: no answer is a 0;
- any white space is one space, and a space before the last full stop does not matter;
- an empty truth is a failure.
"""

from __future__ import annotations

from megatron_vlmr1.rewards import answers, texts
from megatron_vlmr1.rewards.item import RewardItem, check_length


def score(item: RewardItem) -> float:
    """Return 1.0 or 0.0.

    Raises:
        RewardFailure: too_long, or an empty solution.
    """
    if item.compat == "vlm-r1":
        return float(texts.clean_text(item.completion) == texts.clean_text(item.solution))
    check_length(item.completion)
    check_length(item.solution)
    truth = texts.truth(item.solution)
    answer = answers.answer(item.completion)
    return float(answer is not None and texts.plain(answer) == texts.plain(truth))
