"""Tasks whose answer is a text that one reward judges: they differ in that reward only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from megatron_vlmr1.rewards import answers, functions
from megatron_vlmr1.rewards.item import RewardFailure
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

    def metrics(text: str, prompt: Prompt) -> Mapping[str, float | None]:
        """Return the reward, whether it is 1, and whether the text is well formed.

        Raises:
            RewardFailure: as the reward, or there is none of the name that the row gives.
        """
        item = task.item(text, prompt)
        try:
            judge = functions.get(task.reward(ACCURACY, prompt) if by_row else accuracy)
        except ValueError as error:
            raise RewardFailure(str(error)) from error
        score = judge(item)
        return {"accuracy": float(score >= _RIGHT), "score": score, "format": functions.get("format")(item)}

    task = Task(
        name=name,
        template="{question} " + INSTRUCTION,
        recipe={ACCURACY if by_row else accuracy: 1.0, "format": 1.0},
        parse=lambda text, prompt: answers.answer(text),
        metrics=metrics,
        aggregates={"accuracy": "accuracy", "score_mean": "score", "format_rate": "format"},
        accuracy=accuracy,
        worst_by="score",
    )
    return task
