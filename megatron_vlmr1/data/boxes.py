"""The boxes that a solution consists of, and whether they lie in the image."""

from __future__ import annotations

import json
import math
from typing import Any

from megatron_vlmr1.data.rows import METHOD, BadRow, Row

SLACK_PIXELS = 1  # annotators' boxes are often rounded up over the edge
_METHODS = frozenset({"iou", "giou", "diou", "map", "od_ap", "od_ap50", "odLength", "weighted_sum"})
"""Rewards whose truth is boxes; four numbers that are judged by any other need not be one."""

LabelledBox = tuple[str, tuple[float, float, float, float]]  # label ("" without one), (x1, y1, x2, y2) in pixels


def of_solution(solution: str) -> list[LabelledBox] | None:
    """Return the boxes of ``[x1, y1, x2, y2]`` or of a list of ``{"bbox_2d", "label"}``, bare or in a json fence.

    Returns None where the solution is something else; "None" and an empty list are no boxes: [].

    Raises:
        BadRow: a `bbox_2d` that is not four numbers.
    """
    body = solution.strip().removeprefix("```json").removesuffix("```").strip()
    if body == "None":
        return []
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if _is_box(data):
        return [("", _box(data))]
    items = [data] if isinstance(data, dict) else data
    if not isinstance(items, list) or not all(isinstance(item, dict) and "bbox_2d" in item for item in items):
        return None
    for item in items:
        if not _is_box(item["bbox_2d"]):
            raise BadRow(f"the bbox_2d {json.dumps(item['bbox_2d'])[:80]} is not four numbers")
    return [(str(item.get("label", "")), _box(item["bbox_2d"])) for item in items]


def check(row: Row, sizes: list[tuple[int, int]]) -> None:
    """Refuse boxes that are reversed, not finite, or outside the row's one image by more than a pixel.

    A row without or with several images, or whose own reward is not about boxes, is not looked at.

    Args:
        row: what the solution belongs to.
        sizes: (width, height) of each image, upright.

    Raises:
        BadRow: such a box.
    """
    if len(sizes) != 1 or row.extra.get(METHOD, "iou") not in _METHODS:
        return
    width, height = sizes[0]
    for _, (x1, y1, x2, y2) in of_solution(row.solution) or ():
        text = f"box [{x1:g}, {y1:g}, {x2:g}, {y2:g}]"
        if not all(map(math.isfinite, (x1, y1, x2, y2))):
            raise BadRow(f"{text} is not finite")
        if x1 >= x2 or y1 >= y2:
            raise BadRow(f"{text} has no area: expected [x1, y1, x2, y2] with x1 < x2 and y1 < y2")
        if min(x1, y1) < -SLACK_PIXELS or x2 > width + SLACK_PIXELS or y2 > height + SLACK_PIXELS:
            raise BadRow(f"{text} reaches outside the image of {width} x {height} pixels")


def _is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(type(number) in (int, float) for number in value)


def _box(value: list[Any]) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = (_as_float(number) for number in value)
    return x1, y1, x2, y2


def _as_float(number: int | float) -> float:
    try:
        return float(number)
    except OverflowError:  # an integer of hundreds of digits
        return math.inf
