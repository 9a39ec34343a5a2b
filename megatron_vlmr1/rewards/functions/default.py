"""Whether a short answer is right: a formula or number, an option's letter, or a text. Range [0, 1].

Formulas and numbers are compared by math_verify (`mathematics.equal`), within DEADLINE_S. The published reward looks at
as much text as `mathematics.MAX_CHARACTERS`; where it would need more, or longer, it has no value here but a failure.

Mended in the default mode:
- the first answer block counts, and only an answer block: no answer is a 0;
- an empty truth is a failure;
- a number inside a text is no number: "3 dogs" is not "3 cats", and texts with different numbers are different;
- a number or formula is right or wrong, and of several numbers in a sentence none counts;
- a list, range, date or version is a text: "4-3" is not "3-2", though the differences are equal;
- a letter is right or wrong, and "(A)", "A)" and "a" name it;
- a text earns its Levenshtein ratio from MIN_RATIO on only, so that a wrong class earns nothing.
"""

from __future__ import annotations

import re2

from megatron_vlmr1.rewards import answers, mathematics, texts
from megatron_vlmr1.rewards.answers import DIGIT, SPACE
from megatron_vlmr1.rewards.item import RewardFailure, RewardItem, check_length

MIN_RATIO = 0.9
"""Least similarity of two texts that is taken for a slip in writing: one letter in ten."""

DEADLINE_S = 0.25
"""Wall-clock bound on math_verify; after it the default mode compares as text, the published value is a failure."""

PUBLISHED_DEADLINE_S = 0.4

MAX_FORMULA_CHARACTERS = 1000
"""Longest answer that the default mode takes for a formula; 20 ms at the most for the patterns of math_verify."""

MAX_CELLS = 4 * 10**9
"""Most pairs of characters that Levenshtein compares, 64 at a time: 0.2 s."""

_NUMBER = rf"(?:[-+(]|{SPACE})*(?:{DIGIT}+(?:[, ]{DIGIT}{{3}})*(?:[.,]{DIGIT}*)?|\.{DIGIT}+)(?:[%).]|{SPACE})*"
_FORMULA = re2.compile(rf"(?:[A-Za-z]{SPACE}*=)?{_NUMBER}(?:(?:\*\*|[+*/^×÷=]){_NUMBER})*")
_ANY_DIGIT = re2.compile(DIGIT)


def score(item: RewardItem) -> float:
    """Return a value in [0, 1].

    Raises:
        RewardFailure: too_long, too_hard, or no truth.
    """
    if item.compat == "vlm-r1":
        return _published(item)
    check_length(item.completion)
    check_length(item.solution)
    truth = texts.truth(item.solution)
    answer = answers.answer(item.completion)
    if not answer:
        return 0.0
    if _tight(answer) == _tight(truth):
        return 1.0
    if _is_formula(truth):
        return float(numeric(answer, truth) == 1.0 or (_one_formula(answer) and _same_formula(answer, truth)))
    letter = texts.choice(truth)
    if letter is not None and len(texts.plain(truth).strip("()[]")) == 1:
        return float(texts.choice(answer) == letter)
    return _similarity(texts.plain(answer), texts.plain(truth))


def ratio(a: str, b: str, least: float = 0.0) -> float:
    """Return the Levenshtein ratio in [0, 1]: twice the longest common subsequence over the sum of the lengths.

    One below `least` is returned as 0, which takes less time.

    Raises:
        RewardFailure: too_hard, more than MAX_CELLS to compare.
    """
    if len(a) * len(b) > MAX_CELLS:
        raise RewardFailure(f"too_hard: texts of {len(a)} and {len(b)} characters")
    from rapidfuzz.distance import Indel

    return float(Indel.normalized_similarity(a, b, score_cutoff=least))


def numeric(content: str, solution: str) -> float | None:
    """Return 1.0 or 0.0 as the published code compares two numbers, None where one of the texts is none."""
    try:
        return float(float(texts.clean_text(content)) == float(texts.clean_text(solution)))
    except ValueError:
        return None


def _similarity(answer: str, truth: str) -> float:
    """The ratio of two texts, or 0 where it is too small or their numbers differ."""
    if 2 * min(len(answer), len(truth)) < MIN_RATIO * (len(answer) + len(truth)):
        return 0.0  # their lengths alone are too different
    value = ratio(answer, truth, MIN_RATIO)
    return value if value and texts.numbers(answer) == texts.numbers(truth) else 0.0


def _tight(text: str) -> str:
    """The plain text without the spaces around the signs of lists, ranges and times."""
    text = texts.plain(text)
    for sign in ",-:":
        text = text.replace(f" {sign}", sign).replace(f"{sign} ", sign)
    return text


def _is_formula(text: str) -> bool:
    """Numbers with operators between them, or a text marked as LaTeX."""
    return "$" in text or "\\" in text or _FORMULA.fullmatch(answers.encodable(text)) is not None


def _one_formula(answer: str) -> bool:
    return len(answer) <= MAX_FORMULA_CHARACTERS and (_is_formula(answer) or len(texts.numbers(answer)) == 1)


def _same_formula(answer: str, truth: str) -> bool:
    try:
        return mathematics.equal_bare(answer, truth, DEADLINE_S)
    except RewardFailure:
        return False


def _published(item: RewardItem) -> float:
    """The published reward; what it catches is its own 0."""
    truth = texts.published_truth(item.solution)
    answer = texts.published_last(item.completion)
    if mathematics.equal(answer, truth, PUBLISHED_DEADLINE_S):
        return 1.0
    if _ANY_DIGIT.search(answers.encodable(truth)):
        value = numeric(answer, truth)
        return ratio(texts.clean_text(answer), texts.clean_text(truth)) if value is None else value
    letter = texts.published_choice(truth)
    if letter is None:
        return ratio(texts.clean_text(answer), texts.clean_text(truth))
    return float(texts.published_choice(answer) == letter)
