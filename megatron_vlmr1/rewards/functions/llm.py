"""Whether a language model judges an answer right, through an OpenAI-compatible service. 1 or 0. Off by default.

Set VLMR1_JUDGE_URL (``http://host:8000/v1``) and VLMR1_JUDGE_MODEL, and VLMR1_JUDGE_KEY where the service wants one, in
the environment of the reward processes. The judge reads what the trained model wrote, which may try to persuade it.

Mended in the default mode:
- a judge that is off, out of reach, or answers anything but 0 or 1 is a failure, not a comparison of the texts;
- only an answer block counts, the first: no answer is a 0;
- an empty truth is a failure.
"""

from __future__ import annotations

from megatron_vlmr1.rewards import answers, language_judge, texts
from megatron_vlmr1.rewards.item import RewardFailure, RewardItem, check_length


def score(item: RewardItem) -> float:
    """Return 1.0 or 0.0.

    Raises:
        RewardFailure: too_long, no truth, or no verdict.
    """
    if item.compat == "vlm-r1":
        answer, truth = texts.published_last(item.completion), texts.published_truth(item.solution)
        try:
            return language_judge.verdict(answer, truth)
        except RewardFailure:
            return float(answer == truth)
    check_length(item.completion)
    check_length(item.solution)
    truth = texts.truth(item.solution)
    given = answers.answer(item.completion)
    return language_judge.verdict(given, truth) if given else 0.0
