"""Overlap less the distance of the centres (referring expressions). Range [0, 1].

Source: DIoU (arXiv 1911.08287): IoU - d^2 / c^2 with the centres' distance d and the hull's diagonal c, in [-1, 1]; the
reward is (DIoU + 1) / 2, so that boxes apart still differ and none is worth less than no answer, which is a reward of
0. Reads, scales and fails as `iou` does in the default mode. Nothing was published under this name: `compat` changes
nothing.
"""

from __future__ import annotations

import math

from megatron_vlmr1.rewards import boxes, referring
from megatron_vlmr1.rewards.boxes import Box
from megatron_vlmr1.rewards.item import RewardItem


def score(item: RewardItem) -> float:
    """Return (DIoU + 1) / 2 in [0, 1]; 0 without a box, or with one that has no area.

    Raises:
        RewardFailure: too_long, no usable truth, or a grid without the image's size.
    """
    return referring.judge(item, _shifted)


def _shifted(a: Box, b: Box) -> float:
    left, top, right, bottom = boxes.hull(a, b)
    diagonal = math.hypot(right - left, bottom - top)
    distance = math.hypot(a[0] + a[2] - b[0] - b[2], a[1] + a[3] - b[1] - b[3]) / 2.0
    if not (diagonal < math.inf and distance < math.inf):
        return 0.0
    return max(0.0, boxes.iou(a, b) + 1.0 - (distance / diagonal) ** 2) / 2.0
