r"""Whether a formula is right: the same text, equal by math_verify, or the same LaTeX in its last box. 1 or 0.

Within DEADLINE_S, in the main thread; what takes longer is a failure, and so is a truth that is too hard
(`mathematics.refuse_hopeless`).

Mended in the default mode:
- only an answer block counts, the first: no answer is a 0;
- LaTeX needs no dollar signs around it, and without them is not reduced to its last number;
- what follows a unit is not dropped;
- an answer that is too hard is a 0: as a failure, it would be a way around one;
- an ``\fbox`` is a box, and a box is opened for math_verify too;
- an empty truth is a failure.
"""

from __future__ import annotations

from megatron_vlmr1.rewards import answers, latex, mathematics, texts
from megatron_vlmr1.rewards.item import RewardFailure, RewardItem, check_length

DEADLINE_S = 1.0
"""Wall-clock bound on math_verify, which is asked once, or twice in the default mode for half of it each."""


def score(item: RewardItem) -> float:
    """Return 1.0 or 0.0.

    Raises:
        RewardFailure: too_long, too_hard (the truth, in the published value the answer too), or an empty solution.
    """
    if item.compat == "vlm-r1":
        return _published(texts.clean_text(item.completion), texts.clean_text(item.solution))
    check_length(item.completion)
    check_length(item.solution)
    truth = _bare(texts.truth(item.solution))
    if not truth:
        raise RewardFailure("the solution is empty")
    answer = answers.answer(item.completion)
    if not answer:
        return 0.0
    answer = _bare(answer)
    if answer == truth or _same_writing(answer, truth):
        return 1.0
    mathematics.refuse_hopeless(truth)
    try:
        mathematics.refuse_hopeless(answer)
    except RewardFailure:
        return 0.0
    return float(mathematics.equal_bare(answer, truth, DEADLINE_S))


def _bare(text: str) -> str:
    """The content of the last box, without full stops at its end."""
    text = text.replace("\\fbox", "\\boxed")
    try:
        text = latex.unboxed(text)
    except latex.NoBox:
        pass  # something else whose name begins so
    return text.strip().rstrip(". ")


def _same_writing(answer: str, truth: str) -> bool:
    """The normal form takes for a unit, and drops, whatever follows ``\\text{ ``: math_verify knows units better."""
    return "\\text{ " not in answer + truth and latex.equivalent(answer, truth)


def _published(content: str, truth: str) -> float:
    if content == truth or mathematics.equal(content, truth, DEADLINE_S):
        return 1.0
    try:
        return float(latex.equivalent(latex.unboxed(content), truth))
    except latex.NoBox:
        return 0.0
