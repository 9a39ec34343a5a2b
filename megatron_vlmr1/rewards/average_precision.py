"""Average precision as COCO defines it, for one image whose detections all have the same score.

What pycocotools' COCOeval computes for boxes and the area range "all": detections keep the order in which they were
given, the first MAX_DETECTIONS of a class count, precision is interpolated at 101 recalls. Equal to it to 1e-9.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence

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
    counted = [truth for truth in truths if not _out_of_range(truth)]
    if not counted:
        return None
    ordered = counted + [truth for truth in truths if _out_of_range(truth)]
    kept = detections[:MAX_DETECTIONS]
    rows = _rows(kept, ordered)
    overlaps = sorted(overlap for row in rows for overlap, _ in row if overlap == overlap)
    total, value, last = 0.0, 0.0, -1
    for threshold in thresholds:
        # Between two thresholds without an overlap between them nothing changes.
        above = len(overlaps) - bisect_left(overlaps, threshold)
        if above != last:
            value, last = _interpolated(_outcomes(kept, rows, len(counted), threshold), len(counted)), above
        total += value
    return total / len(thresholds)


def _out_of_range(box: Rect) -> bool:
    return box[4] < 0 or box[4] > MAX_AREA


def _rows(detections: Sequence[Rect | None], truths: Sequence[Rect]) -> list[_Row]:
    ordinary = all(map(_ordinary, truths))
    known: dict[Rect, _Row] = {}
    rows: list[_Row] = []
    for detection in detections:
        if detection is None:
            rows.append([])
        elif (row := known.get(detection)) is not None:
            rows.append(row)
        else:
            known[detection] = _row(detection, truths, ordinary and _ordinary(detection))
            rows.append(known[detection])
    return rows


def _ordinary(box: Rect) -> bool:
    return math.isfinite(sum(box))


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


def _outcomes(detections: Sequence[Rect | None], rows: list[_Row], counted: int, threshold: float) -> Iterator[bool]:
    """Yield for each detection that is not ignored whether it is right."""
    taken: set[int] = set()
    for detection, row in zip(detections, rows, strict=True):
        truth = _match(row, taken, counted, threshold) if row else None
        if truth is not None:
            taken.add(truth)
            if truth < counted:
                yield True
        elif detection is None or not _out_of_range(detection):
            yield False


def _match(row: _Row, taken: set[int], counted: int, threshold: float) -> int | None:
    best, chosen = threshold, None
    for overlap, truth in row:
        if truth in taken or overlap < best:
            continue
        if chosen is not None and chosen < counted <= truth:
            break
        best, chosen = overlap, truth
    return chosen


def _interpolated(outcomes: Iterator[bool], counted: int) -> float:
    right = wrong = 0
    precisions = []
    for outcome in outcomes:
        if outcome:
            right += 1
            precisions.append(right / (wrong + right + _SPACING))
        else:
            wrong += 1
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
