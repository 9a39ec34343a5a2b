r"""Whether a formula is right: the same text, equal by math_verify, or the same LaTeX in its last box. 1 or 0.

Within DEADLINE_S, in the main thread; what is too hard (`mathematics.refuse_hopeless`) is a failure.

Mended in the default mode:
- only an answer block counts, the first: no answer is a 0;
- LaTeX needs no dollar signs around it;
- an ``\fbox`` is a box, and a box is opened for math_verify too;
- an empty truth is a failure.
"""

from __future__ import annotations

from megatron_vlmr1.rewards import answers, latex, mathematics, texts
from megatron_vlmr1.rewards.item import RewardItem, check_length

DEADLINE_S = 1.0
"""Wall-clock bound on math_verify, which is asked once, or twice in the default mode for half of it each."""


def score(item: RewardItem) -> float:
    """Return 1.0 or 0.0.

    Raises:
        RewardFailure: too_long, too_hard, or an empty solution.
    """
    if item.compat == "vlm-r1":
        return _published(texts.clean_text(item.completion), texts.clean_text(item.solution))
    check_length(item.completion)
    check_length(item.solution)
    truth = _bare(texts.truth(item.solution))
    answer = answers.answer(item.completion)
    if not answer:
        return 0.0
    answer = _bare(answer)
    if answer == truth or latex.equivalent(answer, truth):
        return 1.0
    if mathematics.equal(answer, truth, DEADLINE_S / 2):
        return 1.0
    if _needs_dollars(answer) or _needs_dollars(truth):
        return float(mathematics.equal(_in_dollars(answer), _in_dollars(truth), DEADLINE_S / 2))
    return 0.0


def _bare(text: str) -> str:
    """The content of the last box, without full stops at its end."""
    text = text.replace("\\fbox", "\\boxed")
    try:
        text = latex.unboxed(text)
    except latex.NoBox:
        pass  # something else whose name begins so
    return text.strip().rstrip(". ")


def _needs_dollars(text: str) -> bool:
    return "$" not in text and ("\\" in text or "^" in text)


def _in_dollars(text: str) -> str:
    return f"${text}$" if _needs_dollars(text) else text


def _published(content: str, truth: str) -> float:
    if content == truth or mathematics.equal(content, truth, DEADLINE_S):
        return 1.0
    try:
        return float(latex.equivalent(latex.unboxed(content), truth))
    except latex.NoBox:
        return 0.0
