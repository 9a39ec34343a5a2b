"""Counting: how many of them are there?"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_vlmr1.rewards import answers
from megatron_vlmr1.rewards.functions import counting
from megatron_vlmr1.rewards.item import RewardFailure, check_length
from megatron_vlmr1.rewards.task import INSTRUCTION, Task
from megatron_vlmr1.types import Prompt


def parse(text: str, prompt: Prompt) -> float | None:
    """Return the answered number, or None.

    Raises:
        RewardFailure: too_long.
    """
    check_length(text)
    answer = answers.answer(text)
    return None if answer is None else counting.number(answer)


def metrics(text: str, prompt: Prompt, measured: Mapping[str, float]) -> dict[str, float | None]:
    """Return whether the number is right, how far it is off where there is one, the reward, and the format.

    Raises:
        RewardFailure: the truth holds no one number, or the text is too long.
    """
    tagged = answers.answer(prompt.truth)
    truth, said = counting.number(prompt.truth if tagged is None else tagged), parse(text, prompt)
    if truth is None:
        raise RewardFailure("the solution holds no one number")
    error = None if said is None else abs(said - truth)
    return {
        "accuracy": float(error == 0),
        "abs_error": error,
        "score": measured["counting"],
        "format": measured["format"],
    }


TASK = Task(
    name="counting",
    template="{question} " + INSTRUCTION,
    recipe={"counting": 1.0, "format": 1.0},
    parse=parse,
    metrics=metrics,
    aggregates={"accuracy": "accuracy", "mae": "abs_error", "score_mean": "score", "format_rate": "format"},
    measured_by=("counting", "format"),
    accuracy="counting",
    worst_by="score",
)
