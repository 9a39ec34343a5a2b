"""Tasks whose answer is a text that one reward judges: they differ in that reward only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from megatron_vlmr1.rewards import answers
from megatron_vlmr1.rewards.task import ACCURACY, INSTRUCTION, Task

if TYPE_CHECKING:
    from megatron_vlmr1.types import Prompt

_RIGHT = 1.0 - 1e-9


def text_task(name: str, accuracy: str, by_row: bool = False) -> Task:
    """Return a task that is rewarded, and measured, by one reward beside the format.

    Args:
        name: the task's.
        accuracy: the reward's name.
        by_row: whether a row may name another one.
    """
    reward = ACCURACY if by_row else accuracy

    def metrics(text: str, prompt: Prompt, measured: Mapping[str, float]) -> Mapping[str, float | None]:
        """Return the reward, whether it is 1, and whether the text is well formed."""
        score = measured[reward]
        return {"accuracy": float(score >= _RIGHT), "score": score, "format": measured["format"]}

    return Task(
        name=name,
        template="{question} " + INSTRUCTION,
        recipe={reward: 1.0, "format": 1.0},
        parse=lambda text, prompt: answers.answer(text),
        metrics=metrics,
        measured_by=(reward, "format"),
        aggregates={"accuracy": "accuracy", "score_mean": "score", "format_rate": "format"},
        accuracy=accuracy,
        worst_by="score",
    )
