"""Open-vocabulary detection: where is what, among the classes that the question names?

The recipe takes what VLM-R1 learned: plain AP is hacked with surplus boxes; in `odLength` they cost.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_vlmr1.rewards import boxes, detections
from megatron_vlmr1.rewards.boxes import Box
from megatron_vlmr1.rewards.detections import Detection
from megatron_vlmr1.rewards.item import check_length
from megatron_vlmr1.rewards.task import INSTRUCTION, Objects, Task
from megatron_vlmr1.types import Prompt

# As published for `odLength`, the instruction stands before the question.
TEMPLATE = (
    INSTRUCTION + "\n{question} "
    'Answer in JSON: [{"bbox_2d": [x1, y1, x2, y2], "label": "class"}, ...], or with None if there is none of them.'
)


def parse(text: str, prompt: Prompt) -> list[Detection] | None:
    """Return the answered boxes in pixels of the original image with their classes, or None for no readable answer.

    Raises:
        RewardFailure: too_long.
    """
    check_length(text)
    return detections.predictions(TASK.item(text, prompt))


def objects(text: str, prompt: Prompt) -> Objects:
    """Return the answered and the true boxes with their classes; no readable answer counts as no box.

    Raises:
        RewardFailure: too_long, or the truth is neither None nor a list of boxes with an area and a class.
    """
    return _objects(parse(text, prompt), text, prompt)


def _objects(answered: list[Detection] | None, text: str, prompt: Prompt) -> Objects:
    return Objects(tuple(answered or ()), tuple(detections.truths(TASK.item(text, prompt))))


def metrics(text: str, prompt: Prompt, measured: Mapping[str, float]) -> dict[str, float | None]:
    """Return how well boxes and classes agree (F1 at an overlap of one half), whether it is a list, and the format.

    Raises:
        RewardFailure: as `objects`.
    """
    answered = parse(text, prompt)
    found, parsed = _objects(answered, text, prompt), float(answered is not None)
    total = len(found.predicted) + len(found.true)
    return {
        "f1": 2 * _hits(found) / total if total else parsed,
        "parsed": parsed,
        "format": measured["format"],
    }


def _hits(found: Objects) -> int:
    """Predictions, in their order, that take the best true box of their class that is left, at half overlap."""
    left: dict[str, list[Box]] = {}
    for label, box in found.true:
        if box is not None:
            left.setdefault(label, []).append(box)
    hits = 0
    for label, box in found.predicted:
        rest = left.get(label)
        if rest and box is not None:
            overlap, best = max((boxes.iou(box, other), i) for i, other in enumerate(rest))
            if overlap >= 0.5:
                del rest[best]
                hits += 1
    return hits


TASK = Task(
    name="ovd",
    template=TEMPLATE,
    recipe={"odLength": 1.0, "format": 1.0},
    parse=parse,
    metrics=metrics,
    aggregates={"f1_mean": "f1", "parsed_rate": "parsed", "format_rate": "format"},
    measured_by=("format",),
    accuracy="odLength",
    objects=objects,
    split_metrics=("detection",),
)
