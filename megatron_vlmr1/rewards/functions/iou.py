"""Overlap of the answered box with the true one (referring expressions). Range [0, 1].

The prediction is in pixels of the resized image and is scaled back when the item has a grid; the truth is in pixels
of the original. No box in the answer is a reward of 0; a truth without a box is a failure.

Mended in the default mode:
- an overlap of one pixel or less in width or height counts;
- coordinates may be decimal, negative, or stand behind a space;
- boxes without area, or reversed, overlap with nothing instead of dividing by zero;
- the truth may be bare, tagged, or json around its box.

Families other than Qwen2.5-VL answer in pixels of the original, so nothing is scaled back; GLM's published overlap has
no quirk of one pixel.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import re2

from megatron_vlmr1.rewards import answers, boxes, referring
from megatron_vlmr1.rewards.answers import DIGIT, SPACE
from megatron_vlmr1.rewards.item import RewardFailure, RewardItem

_PUBLISHED_BOX = re2.compile(rf"\[({DIGIT}+),{SPACE}*({DIGIT}+),{SPACE}*({DIGIT}+),{SPACE}*({DIGIT}+)\]")


def score(item: RewardItem) -> float:
    """Return the overlap in [0, 1].

    Raises:
        RewardFailure: too_long, no usable truth, or a grid without the image's size.
    """
    if item.compat == "vlm-r1":
        return _published(item)
    return referring.judge(item, boxes.iou)


def published_iou(box1: Sequence[float], box2: Sequence[float], pixel: int = 1) -> float:
    """Return the published overlap: 0 where the shared width or height is at most `pixel`, which is 0 for GLM.

    Raises:
        ZeroDivisionError: the union is 0.
    """
    left, top = max(box1[0], box2[0]), max(box1[1], box2[1])
    right, bottom = min(box1[2] - pixel, box2[2] - pixel), min(box1[3] - pixel, box2[3] - pixel)
    shared = (right - left + pixel) * (bottom - top + pixel) if left < right and top < bottom else 0
    union = (box1[2] - box1[0]) * (box1[3] - box1[1]) + (box2[2] - box2[0]) * (box2[3] - box2[1]) - shared
    return float(shared) / union


def _published(item: RewardItem) -> float:
    """The published reward: errors of the truth are raised, errors of the answer are a silent 0."""
    if item.family == "qwen2_5_vl" and (item.image_size is None or item.grid_thw is None):
        raise RewardFailure("the published reward raises without image_size and grid_thw")
    truth = _published_truth(item.solution)
    answer = answers.answer(item.completion)
    match = _PUBLISHED_BOX.search(answers.encodable(answer)) if answer is not None else None
    if match is None:
        return 0.0
    try:
        value = published_iou(_published_box(match.groups(), item), truth, pixel=0 if item.family == "glm" else 1)
    except (ZeroDivisionError, OverflowError, ValueError, TypeError, LookupError):
        return 0.0
    if not math.isfinite(value):
        raise RewardFailure("the published reward is not a finite number here")
    return value


def _published_box(digits: Sequence[str], item: RewardItem) -> list[float]:
    numbers: list[float] = [int(number) for number in digits]
    if item.family != "qwen2_5_vl":
        return numbers
    assert item.grid_thw is not None
    assert item.image_size is not None
    resized = (item.grid_thw[2] * boxes.PATCH_PIXELS, item.grid_thw[1] * boxes.PATCH_PIXELS)
    # In the published order of operations, so that rounding is the published one.
    return [number / resized[i % 2] * item.image_size[i % 2] for i, number in enumerate(numbers)]


def _published_truth(solution: str) -> Any:
    tagged = answers.blocks(solution, "answer")
    if not tagged:
        raise RewardFailure("the published reward raises IndexError: the solution has no <answer> block")
    try:
        return json.loads(tagged[-1].strip())
    except (ValueError, RecursionError) as error:
        raise RewardFailure("the published reward raises JSONDecodeError: the solution is not json") from error
