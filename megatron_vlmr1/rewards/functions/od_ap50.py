"""Mean average precision of the answer block at an overlap of one half, AP50. Range [0, 1].

Mended in the default mode: everything that `map` mends.

The published value (compat) has the range [-1, 1].
"""

from __future__ import annotations

from megatron_vlmr1.rewards import detections, published_detections
from megatron_vlmr1.rewards.item import RewardItem
from megatron_vlmr1.rewards.mean_precision import AP50, mean_average_precision


def score(item: RewardItem) -> float:
    """Return the mean average precision in [0, 1]; published: [-1, 1].

    Raises:
        RewardFailure: too_long, no usable truth, a grid without the image's size, or the published code raises.
    """
    if item.compat == "vlm-r1":
        return published_detections.od_value(item, AP50)
    return detections.judge(item, lambda predicted, truth: mean_average_precision(predicted, truth, AP50))
