"""One box against one true box: how the default rewards of referring expressions read an item."""

from __future__ import annotations

import math
from collections.abc import Callable

from megatron_vlmr1.rewards import answers, boxes
from megatron_vlmr1.rewards.boxes import Box
from megatron_vlmr1.rewards.coordinates import to_original
from megatron_vlmr1.rewards.item import RewardFailure, RewardItem, check_length


def judge(item: RewardItem, value: Callable[[Box, Box], float]) -> float:
    """Return `value` of the predicted and the true box in pixels of the original; 0 for no box or one without area.

    Raises:
        RewardFailure: too_long, no usable truth, or a grid without the image's size.
    """
    check_length(item.completion)
    check_length(item.solution)
    truth = answers.box(item.solution)
    if truth is None or not 0 < boxes.area(truth) < math.inf:
        raise RewardFailure("the solution holds no box [x1, y1, x2, y2] with an area")
    scale = to_original(item)
    answer = answers.answer(item.completion)
    box = answers.box(answer) if answer is not None else None
    if box is not None and scale is not None:
        box = scale(box)
    return value(box, truth) if box is not None and 0 < boxes.area(box) < math.inf else 0.0
