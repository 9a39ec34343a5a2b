"""Generalised overlap of the answered box with the true one (referring expressions). Range [0, 1].

Source: GIoU (arXiv 1902.09630): IoU - (hull - union) / hull, in [-1, 1]; the reward is (GIoU + 1) / 2, so that boxes
apart still differ and none is worth less than no answer, which is a reward of 0. Reads, scales and fails as `iou` does
in the default mode. Nothing was published under this name: `compat` changes nothing.
"""

from __future__ import annotations

import math

from megatron_vlmr1.rewards import boxes, referring
from megatron_vlmr1.rewards.boxes import Box
from megatron_vlmr1.rewards.item import RewardItem


def score(item: RewardItem) -> float:
    """Return (GIoU + 1) / 2 in [0, 1]; 0 without a box, or with one that has no area.

    Raises:
        RewardFailure: too_long, no usable truth, or a grid without the image's size.
    """
    return referring.judge(item, _shifted)


def _shifted(a: Box, b: Box) -> float:
    hull = boxes.area(boxes.hull(a, b))
    overlap = boxes.iou(a, b)
    # union = (area a + area b) / (1 + IoU), and the hull is no smaller.
    union = (boxes.area(a) + boxes.area(b)) / (1.0 + overlap)
    return max(0.0, overlap + min(1.0, union / hull)) / 2.0 if 0 < hull < math.inf else 0.0
