"""Mean average precision AP@[.50:.95], times truths / predictions where there are more predictions. Range [0, 1].

Source: VLM-R1 (arXiv 2504.07615), "odLength": the factor takes away what duplicate boxes earn.

Mended in the default mode: everything that `map` mends, but that surplus boxes cost over the whole list and not class
by class; every item of the list counts as a prediction, the unusable ones too.

The published value (compat) has the range [-1, 1].
"""

from __future__ import annotations

from megatron_vlmr1.rewards import detections, published_detections
from megatron_vlmr1.rewards.detections import Detection
from megatron_vlmr1.rewards.item import RewardItem
from megatron_vlmr1.rewards.mean_precision import mean_average_precision


def score(item: RewardItem) -> float:
    """Return the shortened mean average precision in [0, 1]; published: [-1, 1].

    Raises:
        RewardFailure: too_long, no usable truth, a grid without the image's size, or the published code raises.
    """
    if item.compat == "vlm-r1":
        return published_detections.od_value(item, shorten=True)
    return detections.judge(item, _shortened)


def _shortened(predicted: list[Detection], truth: list[Detection]) -> float:
    value = mean_average_precision(predicted, truth, surplus_costs=False)
    return value * min(1.0, len(truth) / len(predicted))
