"""Referring expression comprehension: which box does this sentence describe?"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_vlmr1.rewards import answers, boxes
from megatron_vlmr1.rewards.boxes import Box
from megatron_vlmr1.rewards.detections import Detection
from megatron_vlmr1.rewards.item import RewardFailure
from megatron_vlmr1.rewards.task import INSTRUCTION, Objects, Task
from megatron_vlmr1.types import Prompt


def parse(text: str, prompt: Prompt) -> Box | None:
    """Return the answered box in pixels of the original image, or None where there is none."""
    answer = answers.answer(text)
    box = answers.box(answer) if answer is not None else None
    if box is None or not prompt.images:
        return box
    return boxes.to_original(box, prompt.images[0].grid_thw, prompt.images[0].size)


def objects(text: str, prompt: Prompt) -> Objects:
    """Return the answered and the true box.

    Raises:
        RewardFailure: the truth holds no box.
    """
    predicted, true = parse(text, prompt), answers.box(prompt.truth)
    if true is None:
        raise RewardFailure("the solution holds no box [x1, y1, x2, y2]")
    return Objects((Detection("", predicted),) if predicted is not None else (), (Detection("", true),))


def metrics(text: str, prompt: Prompt, measured: Mapping[str, float]) -> dict[str, float | None]:
    """Return the overlap, whether it exceeds .5 and .75, its value where there is a box, and the format."""
    overlap = measured["iou"]
    return {
        "iou": overlap,
        "acc50": float(overlap > 0.5),
        "acc75": float(overlap > 0.75),
        "iou_parsed": None if parse(text, prompt) is None else overlap,
        "format": measured["format"],
    }


TASK = Task(
    name="rec",
    template="{question} " + INSTRUCTION + " Output the final answer in JSON format.",
    recipe={"iou": 1.0, "format": 1.0},
    parse=parse,
    metrics=metrics,
    aggregates={
        "acc50": "acc50",
        "acc75": "acc75",
        "iou_mean": "iou",
        "iou_parsed": "iou_parsed",
        "format_rate": "format",
    },
    measured_by=("iou", "format"),
    accuracy="iou",
    worst_by="iou",
    objects=objects,
)
