"""Boxes with their classes, as an answer or a truth lists them: JSON of ``{"bbox_2d": [x1, y1, x2, y2], "label": …}``.

The list may be bare or in a fence, and one object may stand for a list of one; ``None`` and ``[]`` say that there is
nothing. Linear in the text.
"""

from __future__ import annotations

import json
import math
from typing import Any

from megatron_vlmr1.rewards.boxes import Box
from megatron_vlmr1.rewards.task import Labelled

NOWHERE: Labelled = ((0.0, 0.0, 0.0, 0.0), "")
"""What an item that is no labelled box is read as: it counts as a prediction and overlaps with nothing."""


def labelled(text: str) -> tuple[Labelled, ...] | None:
    """Return the labelled boxes of a text, in its order and pixels, or None where it is neither a list nor none."""
    text = _unfenced(text).strip()
    if text.rstrip(".").strip().lower() == "none":
        return ()
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(found, dict):
        found = [found]
    return tuple(map(_item, found)) if isinstance(found, list) else None


def class_name(label: str) -> str:
    """Return a class as it is compared: without regard to case and white space."""
    return " ".join(label.lower().split())


def _unfenced(text: str) -> str:
    for opening in ("```json", "```"):
        before, found, rest = text.partition(opening)
        if found:
            return rest.partition("```")[0]
    return text


def _item(raw: Any) -> Labelled:
    if not isinstance(raw, dict) or not isinstance(raw.get("label"), str):
        return NOWHERE
    box = _box(raw.get("bbox_2d"))
    return NOWHERE if box is None else (box, class_name(raw["label"]))


def _box(raw: Any) -> Box | None:
    if not isinstance(raw, list) or len(raw) != 4 or not all(type(side) in (int, float) for side in raw):
        return None
    try:
        x1, y1, x2, y2 = map(float, raw)
    except OverflowError:
        return None
    return (x1, y1, x2, y2) if all(map(math.isfinite, (x1, y1, x2, y2))) else None
