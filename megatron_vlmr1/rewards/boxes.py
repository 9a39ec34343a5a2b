"""Boxes: (x1, y1, x2, y2) in pixels, their overlap, and the way back from the resized image."""

from __future__ import annotations

import math

Box = tuple[float, float, float, float]

PATCH_PIXELS = 14
"""Side of a vision patch of Qwen2.5-VL: an image of grid (t, h, w) was resized to (w * 14, h * 14) pixels."""


def to_original(box: Box, grid_thw: tuple[int, int, int], image_size: tuple[int, int]) -> Box:
    """Scale a box from pixels of the resized image to pixels of the original, of `image_size` (width, height)."""
    _, rows, columns = grid_thw
    x = image_size[0] / (columns * PATCH_PIXELS)
    y = image_size[1] / (rows * PATCH_PIXELS)
    return (box[0] * x, box[1] * y, box[2] * x, box[3] * y)


def hull(a: Box, b: Box) -> Box:
    """Return the smallest box around two that are not reversed."""
    return (min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3]))


def area(box: Box) -> float:
    """Return the area; a reversed box has none."""
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def iou(a: Box, b: Box) -> float:
    """Return intersection over union in [0, 1]; 0 where the union is empty or too large for a float."""
    shared = area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    union = area(a) + area(b) - shared
    return min(1.0, shared / union) if 0 < union < math.inf else 0.0
