"""What the published detection rewards compute, their quirks included.

Boxes are pixels as they stand in the text: nothing is scaled back from the resized image.
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

from megatron_vlmr1.rewards import answers
from megatron_vlmr1.rewards.average_precision import MAX_DETECTIONS, THRESHOLDS, Rect, average_precision, rect
from megatron_vlmr1.rewards.item import RewardFailure, RewardItem

MAX_PAIRS = 500_000
"""A class with more pairs of a detection and a truth would take seconds."""

# What indexing and subtracting decoded json can raise.
_ERRORS = (TypeError, LookupError, OverflowError)


def fences(text: str) -> Iterator[str]:
    """Return what stands inside each json fence, stripped, in order."""
    return map(str.strip, answers.enclosed(text, "```json", "```"))


def true_items(fenced: str | None) -> list[Any]:
    """Return the items of a solution's fence; those of an object are its keys.

    Raises:
        RewardFailure: it is not json, or nothing to iterate over.
    """
    if not fenced:
        return []
    try:
        return list(json.loads(fenced))
    except (ValueError, TypeError, RecursionError) as error:
        raise _raised(error) from error


def predicted_items(fenced: str | None) -> list[Any]:
    """Return the items of a completion's fence, none where it cannot be read."""
    try:
        return true_items(fenced)
    except RewardFailure:
        return []


def map_value(completion: str, solution: str, thresholds: Sequence[float] = THRESHOLDS, shorten: bool = False) -> float:
    """Return the published mean average precision of the last json fences, in [0, 1], or -1 where no truth counts.

    Args:
        completion: any text.
        solution: any text.
        thresholds: least overlaps of a match.
        shorten: multiply by truths / predictions where there are more predictions than truths.

    Raises:
        RewardFailure: the published code raises.
    """
    truth = true_items(_last(fences(solution)))
    predicted = predicted_items(_last(fences(completion)))
    if truth and predicted:
        value = calculate_map(predicted, truth, thresholds)
    else:
        value = float(not truth and not predicted)
    return value * len(truth) / len(predicted) if shorten and len(predicted) > len(truth) else value


def od_value(item: RewardItem, thresholds: Sequence[float] = THRESHOLDS, shorten: bool = False) -> float:
    """Return `map_value` of the last answer block, 0 where there is none.

    Raises:
        RewardFailure: the published code raises.
    """
    answered = answers.blocks(item.completion, "answer")
    if not answered:
        return 0.0
    truth = answers.answer(item.solution)
    if truth is None:
        raise RewardFailure("the published reward raises TypeError: the solution has no <answer> block")
    return map_value(answered[-1], truth, thresholds, shorten)


def calculate_map(predicted: list[Any], truth: list[Any], thresholds: Sequence[float] = THRESHOLDS) -> float:
    """Return COCO's mean average precision over the classes of the truth, -1 where no truth counts.

    Args:
        predicted: decoded json; what is no box of a class of the truth is dropped.
        truth: decoded json, not empty.
        thresholds: least overlaps of a match.

    Raises:
        RewardFailure: the published code raises, or there are too_many truths.
    """
    classes: dict[Hashable, tuple[list[Any], list[Any]]] = {}
    for item in truth:
        try:
            classes.setdefault(item["label"], ([], []))[0].append(_measured(item))
        except _ERRORS as error:
            raise _raised(error) from error
    usable = False
    for item in predicted:
        if not isinstance(item, dict):
            continue
        try:
            classes[item["label"]][1].append(_measured(item))
            usable = True
        except _ERRORS:
            continue
    if not usable:
        return 0.0
    if any(min(len(found), MAX_DETECTIONS) * len(truths) > MAX_PAIRS for truths, found in classes.values()):
        raise RewardFailure("too_many true boxes of one class")
    values = [
        value
        for truths, detections in classes.values()
        if (value := average_precision(_rects(detections[:MAX_DETECTIONS]), _rects(truths), thresholds)) is not None
    ]
    return math.fsum(values) / len(values) if values else -1.0


def _last(found: Iterator[str]) -> str | None:
    last = None
    for last in found:  # noqa: B007
        pass
    return last


def _measured(item: Any) -> Any:
    """Return the item's four coordinates, after the arithmetic that the published code does with them."""
    x1, y1, x2, y2 = (item["bbox_2d"][corner] for corner in range(4))
    (x2 - x1) * (y2 - y1)  # noqa: B018
    return x1, y1, x2, y2


def _rects(boxes: list[Any]) -> list[Rect]:
    try:
        return [rect(*box) for box in boxes]
    except OverflowError as error:
        raise _raised(error) from error


def _raised(error: Exception) -> RewardFailure:
    return RewardFailure(f"the published reward raises {type(error).__name__}: {str(error)[:80]}")
