"""Greedy matching of predicted boxes to true ones by their overlap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron_vlmr1.rewards.item import RewardFailure

Match = tuple[float, int, int]
"""(overlap, index of the prediction, index of the truth)."""

MAX_PAIRS = 1_000_000


def overlapping(
    predicted: Sequence[Any], truths: Sequence[Any], overlap: Callable[[Any, Any], float], least: float
) -> list[Match]:
    """Return the pairs that overlap by `least`, prediction by prediction.

    Args:
        predicted: boxes (x1, y1, x2, y2), None for one that overlaps with nothing.
        truths: likewise.
        overlap: intersection over union, or less; asked only where it can reach one third.
        least: at least one third.

    Raises:
        RewardFailure: too_many boxes.
    """
    if len(predicted) * len(truths) > MAX_PAIRS:
        raise RewardFailure(f"too_many boxes: {len(predicted)} predictions and {len(truths)} truths")
    sized = [(index, box, _area(box)) for index, box in enumerate(truths) if box is not None]
    pairs: list[Match] = []
    for i, box in enumerate(predicted):
        if box is None:
            continue
        x1, y1, x2, y2 = box
        area = _area(box)
        pairs += [
            (value, i, j)
            for j, other, size in sized
            if area <= 3 * size and size <= 3 * area
            if other[0] < x2 and x1 < other[2] and other[1] < y2 and y1 < other[3]
            if (value := overlap(box, other)) >= least
        ]
    return pairs


def greedy(pairs: list[Match]) -> list[Match]:
    """Return the matches: the largest overlap first, of equal ones the earlier pair, each box once."""
    matches: list[Match] = []
    used: tuple[set[int], set[int]] = (set(), set())
    for pair in sorted(pairs, key=lambda pair: -pair[0]):
        if pair[1] not in used[0] and pair[2] not in used[1]:
            matches.append(pair)
            used[0].add(pair[1])
            used[1].add(pair[2])
    return matches


def completeness(matches: int, predicted: int, truths: int) -> float:
    """Return one minus the mean of the rates of missed truths and of false alarms, in [0, 1]."""
    return 1.0 - ((truths - matches) / truths + (predicted - matches) / predicted) / 2.0


def _area(box: Any) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
