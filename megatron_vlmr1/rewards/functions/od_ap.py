"""Mean average precision AP@[.50:.95] of the answer block. Range [0, 1].

Mended in the default mode: everything that `map` mends, and so the same value as `map`, which already reads the answer
block only.

The published value (compat) has the range [-1, 1].
"""

from __future__ import annotations

from megatron_vlmr1.rewards import detections, published_detections
from megatron_vlmr1.rewards.item import RewardItem
from megatron_vlmr1.rewards.mean_precision import mean_average_precision


def score(item: RewardItem) -> float:
    """Return the mean average precision in [0, 1]; published: [-1, 1].

    Raises:
        RewardFailure: too_long, no usable truth, a grid without the image's size, or the published code raises.
    """
    if item.compat == "vlm-r1":
        return published_detections.od_value(item)
    return detections.judge(item, mean_average_precision)
