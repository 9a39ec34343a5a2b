"""Referring expression comprehension: which box does this sentence describe?"""

from __future__ import annotations

from megatron_vlmr1.rewards import answers, boxes
from megatron_vlmr1.rewards.boxes import Box
from megatron_vlmr1.rewards.functions import format as format_reward
from megatron_vlmr1.rewards.functions import iou as iou_reward
from megatron_vlmr1.rewards.task import Task
from megatron_vlmr1.types import Prompt

# VLM-R1's template; the instruction is part of the method.
TEMPLATE = (
    "{question} First output the thinking process in <think> </think> tags and then output the final answer in "
    "<answer> </answer> tags. Output the final answer in JSON format."
)


def parse(text: str, prompt: Prompt) -> Box | None:
    """Return the answered box in pixels of the original image, or None where there is none."""
    answer = answers.answer(text)
    box = answers.box(answer) if answer is not None else None
    if box is None or not prompt.images:
        return box
    return boxes.to_original(box, prompt.images[0].grid_thw, prompt.images[0].size)


def metrics(text: str, prompt: Prompt) -> dict[str, float]:
    """Return the overlap, whether it exceeds one half, and whether the text is well formed.

    Raises:
        RewardFailure: the truth holds no box, or the text is too long.
    """
    item = TASK.item(text, prompt)
    overlap = iou_reward.score(item)
    return {"iou": overlap, "acc50": float(overlap > 0.5), "format": format_reward.score(item)}


TASK = Task(
    name="rec",
    template=TEMPLATE,
    recipe={"iou": 1.0, "format": 1.0},
    parse=parse,
    metrics=metrics,
    aggregates={"acc50": "acc50", "iou_mean": "iou", "format_rate": "format"},
)
