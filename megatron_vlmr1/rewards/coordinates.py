"""From the coordinates a model answers in to pixels of the original image."""

from __future__ import annotations

from collections.abc import Callable

from megatron_vlmr1.rewards import boxes
from megatron_vlmr1.rewards.boxes import Box
from megatron_vlmr1.rewards.item import RewardFailure, RewardItem


def to_original(item: RewardItem) -> Callable[[Box], Box] | None:
    """Return the function that takes a predicted box to pixels of the original image, None where it stays as it is.

    Qwen2.5-VL answers in pixels of the resized image where the item has a grid.

    Raises:
        RewardFailure: a grid without the image's size, or a zero in either.
    """
    if item.grid_thw is None or item.family != "qwen2_5_vl":
        return None
    if item.image_size is None or 0 in item.grid_thw or 0 in item.image_size:
        raise RewardFailure("grid_thw needs image_size beside it, and no zero in either")
    grid, size = item.grid_thw, item.image_size
    return lambda box: boxes.to_original(box, grid, size)
