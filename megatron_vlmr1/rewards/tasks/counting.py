"""Counting: how many of them are there?"""

from __future__ import annotations

import math

import re2

from megatron_vlmr1.rewards import answers, functions
from megatron_vlmr1.rewards.item import RewardFailure, check_length
from megatron_vlmr1.rewards.labelled import labelled
from megatron_vlmr1.rewards.task import INSTRUCTION, Task
from megatron_vlmr1.types import Prompt

_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()
_NUMBER = re2.compile(r"[-+]?[0-9]+(?:\.[0-9]+)?|(?i:\b(?:" + "|".join(_WORDS) + r")\b)")


def count(text: str) -> float | None:
    """Return the first number of a text, in digits or as a word up to twenty; a list of boxes counts its boxes."""
    found = labelled(text)
    if found is not None:
        return float(len(found))
    match = _NUMBER.search(answers.encodable(text))
    if match is None:
        return None
    word = match.group().lower()
    number = float(_WORDS.index(word) if word in _WORDS else word)
    return number if math.isfinite(number) else None


def parse(text: str, prompt: Prompt) -> float | None:
    """Return the answered number, or None.

    Raises:
        RewardFailure: too_long.
    """
    check_length(text)
    answer = answers.answer(text)
    return None if answer is None else count(answer)


def metrics(text: str, prompt: Prompt) -> dict[str, float | None]:
    """Return whether the number is right, how far it is off where there is one, and the format.

    Raises:
        RewardFailure: the truth holds no number, or the text is too long.
    """
    tagged = answers.answer(prompt.truth)
    truth = count(prompt.truth if tagged is None else tagged)
    if truth is None:
        raise RewardFailure("the solution holds no number")
    number = parse(text, prompt)
    error = None if number is None else abs(number - truth)
    return {
        "accuracy": float(error == 0),
        "abs_error": error,
        "closeness": 0.0 if error is None else 1 / (1 + error),
        "format": functions.get("format")(TASK.item(text, prompt)),
    }


TASK = Task(
    name="counting",
    template="{question} " + INSTRUCTION,
    recipe={"counting": 1.0, "format": 1.0},
    parse=parse,
    metrics=metrics,
    aggregates={"accuracy": "accuracy", "mae": "abs_error", "format_rate": "format"},
    accuracy="counting",
    worst_by="closeness",
)
