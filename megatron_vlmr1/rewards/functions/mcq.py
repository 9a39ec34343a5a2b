"""Whether the option named is the right one (multiple choice). 1 or 0.

Mended in the default mode:
- "(A)", "A)" and "a" name an option, also inside a sentence where they have their bracket;
- only an answer block counts, the first: no answer is a 0;
- several options name none, instead of the one that a list of words prefers;
- a truth may stand on a line of its own inside its tags; one that names no option is a failure.
"""

from __future__ import annotations

from megatron_vlmr1.rewards import answers, texts
from megatron_vlmr1.rewards.item import RewardFailure, RewardItem, check_length


def score(item: RewardItem) -> float:
    """Return 1.0 or 0.0.

    Raises:
        RewardFailure: too_long, or the solution names no option.
    """
    if item.compat == "vlm-r1":
        truth = texts.published_choice(texts.published_truth(item.solution)) or item.solution.strip()
        return float(texts.published_choice(texts.published_first(item.completion)) == truth)
    check_length(item.completion)
    check_length(item.solution)
    letter = texts.choice(texts.truth(item.solution))
    if letter is None:
        raise RewardFailure("the solution names no single option")
    answer = answers.answer(item.completion)
    return float(answer is not None and texts.choice(answer) == letter)
