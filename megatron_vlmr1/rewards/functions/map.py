"""Mean average precision of labelled boxes, AP@[.50:.95] as COCO defines it. Range [0, 1].

All boxes have one score, so that the order of the list decides. In pixels of the original image. No readable answer is
a reward of 0; a truth that is neither "None" nor a list of labelled boxes is a failure.

Mended in the default mode:
- a predicted class that the truth lacks counts with 0 in the mean over classes (unlabelled boxes are such a class);
- surplus boxes cost: a class's precision is multiplied by truths / predictions where it has more predictions;
- an unusable or reversed box counts as a wrong prediction instead of vanishing;
- labels are compared without regard to case and white space;
- predictions are scaled back from the resized image;
- the first answer block counts, its json may stand in any fence or bare, and one object is a list of one;
- where the truth is None only an answer that says so, or an empty list, earns 1;
- a reversed truth is a failure, never -1.

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
        return published_detections.map_value(item.completion, item.solution)
    return detections.judge(item, mean_average_precision)
