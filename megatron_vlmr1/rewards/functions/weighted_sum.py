"""Overlap of greedily matched boxes and completeness of the list, .7 and .3. Range [0, 1].

.7 * (sum of the matches' overlaps) / truths + .3 * (1 - (rate of misses + rate of false alarms) / 2); a match overlaps
by at least one half.

Mended in the default mode:
- only boxes of one label are matched, and a box without a label matches nothing instead of raising;
- overlaps of one pixel or less in width or height count;
- labels are compared without regard to white space too;
- predictions are scaled back from the resized image;
- the first answer block counts, its json may stand in any fence or bare, and one object is a list of one;
- a truth without a usable list of labelled boxes is a failure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from megatron_vlmr1.rewards import boxes, detections, matching, published_detections
from megatron_vlmr1.rewards.detections import Detection
from megatron_vlmr1.rewards.functions.iou import published_iou
from megatron_vlmr1.rewards.item import RewardFailure, RewardItem
from megatron_vlmr1.rewards.texts import clean_text

_LEAST_OVERLAP = 0.5


def score(item: RewardItem) -> float:
    """Return the weighted sum in [0, 1].

    Raises:
        RewardFailure: too_long, too_many boxes, no usable truth, a grid without the image's size, or the published
            code raises.
    """
    if item.compat != "vlm-r1":
        return detections.judge(item, _weighted_sum)
    completion, solution = clean_text(item.completion), clean_text(item.solution)
    if solution == "none":
        return float(completion == "none")
    return published_detection_score(completion, solution)


def _weighted_sum(predicted: list[Detection], truth: list[Detection]) -> float:
    pairs = matching.overlapping([box for _, box in predicted], [box for _, box in truth], boxes.iou, _LEAST_OVERLAP)
    matches = matching.greedy([pair for pair in pairs if predicted[pair[1]].label == truth[pair[2]].label])
    position = math.fsum(overlap for overlap, _, _ in matches) / len(truth)
    return min(1.0, 0.7 * position + 0.3 * matching.completeness(len(matches), len(predicted), len(truth)))


def published_detection_score(
    content: str, solution: str, alpha: float = 0.7, beta: float = 0.0, gamma: float = 0.3
) -> float:
    """Return the published weighted mean of position (`alpha`), labels (`beta`) and completeness (`gamma`).

    Raises:
        RewardFailure: too_many boxes, or the published code raises.
    """
    predicted = published_detections.predicted_items(next(published_detections.fences(content), None))
    truth = published_detections.true_items(next(published_detections.fences(solution), None))
    if not predicted or not truth:
        return float(not predicted and not truth)
    pairs = matching.overlapping(_boxes(predicted), _boxes(truth), _overlap, _LEAST_OVERLAP)
    matches = matching.greedy(pairs)
    right = [_label(predicted[i]) == _label(truth[j]) for _, i, j in matches]
    position = sum(match[0] for match, same in zip(matches, right, strict=True) if same) / len(truth)
    completeness = matching.completeness(len(matches), len(predicted), len(truth))
    total = alpha * position + beta * (sum(right) / len(truth)) + gamma * completeness
    return min(1.0, total / (alpha + beta + gamma))


def _boxes(items: Iterable[Any]) -> list[Any]:
    """Return each item's box, or None where the published overlap raises, which counts as no overlap."""
    return [_box(item) for item in items]


def _box(item: Any) -> Any:
    box = item.get("bbox_2d") if isinstance(item, dict) else None
    if not isinstance(box, list) or len(box) < 4 or not all(isinstance(number, int | float) for number in box[:4]):
        return None
    try:
        (box[2] - box[0]) * (box[3] - box[1])  # noqa: B018
    except OverflowError:
        return None
    return box[:4]


def _overlap(a: Any, b: Any) -> float:
    try:
        return published_iou(a, b)
    except (ZeroDivisionError, OverflowError):
        return 0.0


def _label(item: Any) -> str:
    label = item.get("label")
    if not isinstance(label, str):
        raise RewardFailure("the published reward raises: a matched box has no label to compare")
    return label.lower()
