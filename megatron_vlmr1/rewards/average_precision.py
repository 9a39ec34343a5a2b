"""Average precision as COCO defines it, for one image whose detections all have the same score.

What pycocotools' COCOeval computes for boxes and the area range "all": detections keep the order in which they were
given, the first MAX_DETECTIONS of a class count, precision is interpolated at 101 recalls. Equal to it to 1e-9.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

Rect = tuple[float, float, float, float, float]
"""(x, y, x + width, y + height, width * height), pixels. Reversed boxes and numbers that are not finite are allowed."""

THRESHOLDS = (*(0.5 + i * ((0.95 - 0.5) / 9) for i in range(9)), 0.95)
MAX_DETECTIONS = 100
MAX_AREA = 1e5**2
"""Truths of a larger or a negative area are ignored, and so are the detections of such an area that match nothing."""

_RECALLS = (*(i * 0.01 for i in range(100)), 1.0)
_SPACING = math.ulp(1.0)

_Row = list[tuple[float, int]]  # (overlap, index of the truth), in the order of the truths


def rect(x1: float, y1: float, x2: float, y2: float) -> Rect:
    """Return the rectangle as COCO stores it: rounded as position and size, not as two corners.

    Raises:
        OverflowError: an integer is too large for a float.
    """
    x, y, width, height = float(x1), float(y1), float(x2 - x1), float(y2 - y1)
    return (x, y, width + x, height + y, width * height)


def average_precision(
    detections: Sequence[Rect | None], truths: Sequence[Rect], thresholds: Sequence[float] = THRESHOLDS
) -> float | None:
    """Return the mean over `thresholds` of one class's average precision, in [0, 1].

    Args:
        detections: the most certain first; None matches nothing and counts as wrong.
        truths: in order; of several equal overlaps the last truth is matched.
        thresholds: least overlaps of a match, ascending, none below one half.

    Returns:
        None where no truth counts.
    """
    counted = [truth for truth in truths if not (truth[4] < 0 or truth[4] > MAX_AREA)]
    if not counted:
        return None
    ignored = [truth for truth in truths if truth[4] < 0 or truth[4] > MAX_AREA] if len(counted) < len(truths) else []
    kept = detections[:MAX_DETECTIONS]
    rows = _rows(kept, counted + ignored)
    overlaps = sorted([overlap for row in rows for overlap, _ in row if overlap == overlap])
    if not any(rows):
        return 0.0
    unpunished = [box is not None and (box[4] < 0 or box[4] > MAX_AREA) for box in kept]
    total = value = 0.0
    below = -1
    for threshold in thresholds:
        # Nothing changes from one threshold to the next without an overlap between them.
        if below < 0 or (below < len(overlaps) and overlaps[below] < threshold):
            below = bisect_left(overlaps, threshold)
            value = _interpolated(_precisions(rows, unpunished, len(counted), threshold), len(counted))
        total += value
    return total / len(thresholds)


def _rows(detections: Sequence[Rect | None], truths: Sequence[Rect]) -> list[_Row]:
    ordinary = math.isfinite(sum(map(sum, truths)))
    known: dict[Rect | None, _Row] = {None: []}
    rows = []
    for detection in detections:
        row = known.get(detection)
        if row is None:
            assert detection is not None
            row = known[detection] = _row(detection, truths, ordinary and math.isfinite(sum(detection)))
        rows.append(row)
    return rows


def _row(detection: Rect, truths: Sequence[Rect], ordinary: bool) -> _Row:
    if not ordinary:
        row = [(_overlap(detection, truth), index) for index, truth in enumerate(truths)]
        if any(overlap != overlap for overlap, _ in row):
            return row  # after an overlap that is not a number, everything matches
        return [pair for pair in row if pair[0] >= 0.5]
    x, y, right, bottom, _ = detection
    return [
        (overlap, index)
        for index, truth in enumerate(truths)
        if truth[0] < right and x < truth[2] and truth[1] < bottom and y < truth[3]
        if not (overlap := _overlap(detection, truth)) < 0.5
    ]


def _overlap(a: Rect, b: Rect) -> float:
    """Intersection over union in C's arithmetic, where a quotient by zero is no error and NaN is not a minimum."""
    ax, ay, aright, abottom, aarea = a
    bx, by, bright, bbottom, barea = b
    width = (bright if bright < aright or aright != aright else aright) - (bx if bx > ax or ax != ax else ax)
    if width <= 0:
        return 0.0
    height = (bbottom if bbottom < abottom or abottom != abottom else abottom) - (by if by > ay or ay != ay else ay)
    if height <= 0:
        return 0.0
    shared = width * height
    union = aarea + barea - shared
    if union == 0:
        return math.inf if shared > 0 else math.nan
    return shared / union


def _precisions(rows: list[_Row], unpunished: list[bool], counted: int, threshold: float) -> list[float]:
    """Return the precision at each right detection; matches with truths from index `counted` on don't count at all."""
    taken: set[int] = set()
    precisions: list[float] = []
    right = wrong = 0
    for row, free in zip(rows, unpunished, strict=True):
        best, chosen = threshold, -1
        for overlap, truth in row:
            if overlap < best or truth in taken:
                continue
            if -1 < chosen < counted <= truth:
                break
            best, chosen = overlap, truth
        if chosen < 0:
            wrong += not free
            continue
        taken.add(chosen)
        if chosen < counted:
            right += 1
            precisions.append(right / (wrong + right + _SPACING))
    return precisions


def _interpolated(precisions: list[float], counted: int) -> float:
    total = best = 0.0
    levels = _levels(counted)
    for hit in range(len(precisions) - 1, -1, -1):
        best = max(best, precisions[hit])
        total += levels[hit] * best
    return total / len(_RECALLS)


@functools.lru_cache(maxsize=1024)
def _levels(counted: int) -> tuple[int, ...]:
    """How many of the 101 recalls are reached with the first, second, … right detection; recall 0 with the first."""
    reached = [bisect_right(_RECALLS, hits / counted) for hits in range(1, min(counted, MAX_DETECTIONS) + 1)]
    return tuple(now - before for now, before in zip(reached, [0, *reached], strict=False))
