"""Open-vocabulary detection: where is what, among the classes that the question names?

The recipe takes what VLM-R1 learned: plain AP is hacked, since boxes of any further class cost nothing; `odLength`
makes each surplus box cost.
"""

from __future__ import annotations

from megatron_vlmr1.rewards import answers, boxes, functions
from megatron_vlmr1.rewards.boxes import Box
from megatron_vlmr1.rewards.item import RewardFailure, check_length
from megatron_vlmr1.rewards.labelled import Labelled, labelled
from megatron_vlmr1.rewards.task import INSTRUCTION, Objects, Task
from megatron_vlmr1.types import Prompt

# As published for `odLength`, the instruction stands before the question.
TEMPLATE = (
    INSTRUCTION + "\n{question} "
    'Answer in JSON: [{"bbox_2d": [x1, y1, x2, y2], "label": "class"}, ...], or with None if there is none of them.'
)


def parse(text: str, prompt: Prompt) -> tuple[Labelled, ...] | None:
    """Return the answered boxes in pixels of the original image with their classes, or None for no list.

    Raises:
        RewardFailure: too_long.
    """
    check_length(text)
    answer = answers.answer(text)
    found = labelled(answer) if answer is not None else None
    if found is None or not prompt.images:
        return found
    image = prompt.images[0]
    return tuple((boxes.to_original(box, image.grid_thw, image.size), label) for box, label in found)


def objects(text: str, prompt: Prompt) -> Objects:
    """Return the answered and the true boxes with their classes; no list counts as no box.

    Raises:
        RewardFailure: too_long, or the truth is no list of boxes with an area, or None.
    """
    tagged = answers.answer(prompt.truth)
    true = labelled(prompt.truth if tagged is None else tagged)
    if true is None or any(boxes.area(box) == 0 for box, _ in true):
        raise RewardFailure("the solution is neither a list of labelled boxes with an area nor None")
    return Objects(parse(text, prompt) or (), true)


def metrics(text: str, prompt: Prompt) -> dict[str, float | None]:
    """Return how well boxes and classes agree (F1 at an overlap of one half), whether it is a list, and the format.

    Raises:
        RewardFailure: as `objects`.
    """
    found = objects(text, prompt)
    total = len(found.predicted) + len(found.true)
    hits = _hits(found)
    return {
        "f1": 2 * hits / total if total else float(parse(text, prompt) is not None),
        "parsed": float(parse(text, prompt) is not None),
        "format": functions.get("format")(TASK.item(text, prompt)),
    }


def _hits(found: Objects) -> int:
    """Predictions, in their order, that take the best true box of their class that is left, at half overlap."""
    left: dict[str, list[Box]] = {}
    for box, label in found.true:
        left.setdefault(label, []).append(box)
    hits = 0
    for box, label in found.predicted:
        rest = left.get(label)
        if rest:
            best = max(range(len(rest)), key=lambda i: boxes.iou(box, rest[i]))
            if boxes.iou(box, rest[best]) >= 0.5:
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
    accuracy="odLength",
    objects=objects,
    split_metrics=("detection",),
)
