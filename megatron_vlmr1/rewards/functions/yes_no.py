"""Whether yes or no is answered as it should be. 1 or 0.

Mended in the default mode:
- whole words only: "know" and "nothing" are no no;
- only an answer block counts, the first: no answer is a 0;
- an answer with neither word is a 0, a truth with neither a failure.
"""

from __future__ import annotations

import re2

from megatron_vlmr1.rewards import answers, texts
from megatron_vlmr1.rewards.item import RewardFailure, RewardItem, check_length

_WORD = re2.compile(r"(?i)(?:^|[^\pL\pM\pN_])(yes|no)(?:$|[^\pL\pM\pN_])")


def score(item: RewardItem) -> float:
    """Return 1.0 or 0.0.

    Raises:
        RewardFailure: too_long, or a solution with neither word.
    """
    if item.compat == "vlm-r1":
        truth = texts.published_truth(item.solution.lower())
        return float(_published(truth) == _published(texts.published_first(item.completion.lower())))
    check_length(item.completion)
    check_length(item.solution)
    expected = _first(texts.truth(item.solution))
    if expected is None:
        raise RewardFailure("the solution says neither yes nor no")
    answer = answers.answer(item.completion)
    return float(answer is not None and _first(answer) == expected)


def _first(text: str) -> str | None:
    match = _WORD.search(answers.encodable(text))
    return None if match is None else match.group(1).lower()


def _published(text: str) -> str:
    found = [(place, word) for word in ("yes", "no") if (place := text.find(word)) >= 0]
    return min(found)[1] if found else ""
