"""The answered number against the true number. Range [0, 1].

max(0, 1 - |answer - truth| / max(truth, 1)): 1 only where they are equal, and falling with the relative error. Digits,
or words from zero to twenty; "none" is 0. An answer that is a list of boxes counts them, and so does a truth. An answer
without a number, or with several different ones, is a reward of 0; such a truth is a failure. Nothing was published
under this name: `compat` changes nothing.
"""

from __future__ import annotations

import itertools
import math

import re2

from megatron_vlmr1.rewards import answers, detections
from megatron_vlmr1.rewards.item import RewardFailure, RewardItem, check_length

_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()
_VALUES = {word: float(value) for value, word in enumerate(_WORDS)} | {"none": 0.0}
_MAX_NUMBERS = 16  # an answer that repeats its number more often is none

_NUMBER = re2.compile(
    rf"(?i)[-+]?[0-9]{{1,3}}(?:,[0-9]{{3}})+(?:\.[0-9]+)?\b|[-+]?[0-9]+(?:\.[0-9]+)?\b|\b(?:{'|'.join(_VALUES)})\b"
)


def score(item: RewardItem) -> float:
    """Return the closeness in [0, 1].

    Raises:
        RewardFailure: too_long, or the solution holds no one number.
    """
    check_length(item.completion)
    check_length(item.solution)
    tagged = answers.answer(item.solution)
    truth = _number(item.solution if tagged is None else tagged)
    if truth is None or truth < 0:
        raise RewardFailure("the solution holds no number, or several")
    answer = answers.answer(item.completion)
    number = _number(answer) if answer is not None else None
    return 0.0 if number is None else max(0.0, 1.0 - abs(number - truth) / max(truth, 1.0))


def _number(text: str) -> float | None:
    found = detections.parse(text)
    if found and any(box is not None for _, box in found):
        return float(len(found))
    if found == []:
        return 0.0
    matches = itertools.islice(_NUMBER.finditer(answers.encodable(text)), _MAX_NUMBERS + 1)
    numbers = [_value(match.group().lower()) for match in matches]
    if not numbers or len(numbers) > _MAX_NUMBERS or len(set(numbers)) > 1:
        return None
    return numbers[0] if math.isfinite(numbers[0]) else None


def _value(text: str) -> float:
    return _VALUES[text] if text in _VALUES else float(text.replace(",", ""))
