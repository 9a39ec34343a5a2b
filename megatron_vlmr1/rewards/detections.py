"""Labelled boxes in a text: the one convention of the default detection rewards.

A list of ``{"bbox_2d": [x1, y1, x2, y2], "label": "cat"}``, or one such object, as json in a fence or bare, in the
first answer block. "None" and an empty list say that there is nothing.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any, NamedTuple

from megatron_vlmr1.rewards import answers
from megatron_vlmr1.rewards.average_precision import MAX_AREA
from megatron_vlmr1.rewards.boxes import Box
from megatron_vlmr1.rewards.coordinates import to_original
from megatron_vlmr1.rewards.item import RewardFailure, RewardItem, check_length

# Integers as floats: one of a thousand digits makes its own box unusable, not the whole answer.
_DECODER = json.JSONDecoder(parse_int=float)
_FOUR_NUMBERS = [float] * 4


MAX_TRUTHS = 1000


class Detection(NamedTuple):
    """A labelled box in pixels; `box` is None where it has no usable area, `label` is "" where there is none."""

    label: str
    box: Box | None


_UNUSABLE = Detection("", None)


def parse(text: str, scale: Callable[[Box], Box] | None = None) -> list[Detection] | None:
    """Return the labelled boxes of an answer's content, or None where it says neither boxes nor "none".

    Items of the list that are no labelled boxes stay in it, without a label or without a box. Each box goes through
    `scale`; it is usable if its area then is one that COCO counts.
    """
    body = _body(text)
    if body.rstrip(".").strip().lower() == "none":
        return []
    try:
        data = _DECODER.decode(body)
    except (ValueError, RecursionError):
        return None
    if data is None:
        return []
    if isinstance(data, dict):
        data = [data]
    elif not isinstance(data, list):
        return None
    return [_detection(item, scale) if isinstance(item, dict) else _UNUSABLE for item in data]


def truths(item: RewardItem) -> list[Detection]:
    """Return the true boxes, in pixels of the original image.

    Raises:
        RewardFailure: the solution holds no list of labelled boxes, too many, or one of them is unusable.
    """
    tagged = answers.answer(item.solution)
    found = parse(item.solution if tagged is None else tagged)
    if found is None:
        raise RewardFailure("the solution is neither None nor a json list of labelled boxes")
    if len(found) > MAX_TRUTHS:
        raise RewardFailure(f"too_many boxes: the solution has more than {MAX_TRUTHS}")
    if any(not label or box is None for label, box in found):
        raise RewardFailure("the solution has an item without a label or a box [x1, y1, x2, y2] with an area")
    return found


def predictions(item: RewardItem) -> list[Detection] | None:
    """Return the predicted boxes, in pixels of the original image, or None where the completion answers nothing.

    Raises:
        RewardFailure: a grid without the image's size.
    """
    scale = to_original(item)
    answer = answers.answer(item.completion)
    return parse(answer, scale) if answer is not None else None


def judge(item: RewardItem, value: Callable[[list[Detection], list[Detection]], float]) -> float:
    """Return `value` of the predicted and the true boxes, neither of them empty.

    Where the truth is None the value is 1.0 for an answer that says so and 0.0 for any other; a completion without a
    readable answer gets 0.0.

    Raises:
        RewardFailure: too_long, no usable truth, or a grid without the image's size.
    """
    check_length(item.completion)
    check_length(item.solution)
    truth = truths(item)
    predicted = predictions(item)
    if not truth:
        return float(predicted == [])
    return value(predicted, truth) if predicted else 0.0


def _body(text: str) -> str:
    """What stands inside the first fence, else the whole text."""
    _, fence, rest = text.partition("```")
    if not fence:
        return text.strip()
    inside = rest.partition("```")[0]
    word, line_break, lines = inside.partition("\n")
    if line_break and (not word.strip() or word.strip().isalnum()):
        return lines.strip()
    return inside.strip().removeprefix("json").strip()


def _detection(item: dict[str, Any], scale: Callable[[Box], Box] | None) -> Detection:
    label, numbers = item.get("label"), item.get("bbox_2d")
    label = _normalised(label) if isinstance(label, str) else ""
    if not isinstance(numbers, list) or [*map(type, numbers)] != _FOUR_NUMBERS:
        return Detection(label, None)
    box = (numbers[0], numbers[1], numbers[2], numbers[3])
    if scale is not None:
        box = scale(box)
    width, height = box[2] - box[0], box[3] - box[1]
    return Detection(label, box if width > 0 and height > 0 and 0 < width * height <= MAX_AREA else None)


@functools.lru_cache(maxsize=128)
def _normalised(label: str) -> str:
    return " ".join(label.casefold().split())
