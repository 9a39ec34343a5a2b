"""Labelled boxes in a text: the one convention of the default detection rewards.

A list of ``{"bbox_2d": [x1, y1, x2, y2], "label": "cat"}``, or one such object, as json in a fence or bare, in the
first answer block. "None" and an empty list say that there is nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from megatron_vlmr1.rewards import answers, boxes
from megatron_vlmr1.rewards.average_precision import MAX_AREA
from megatron_vlmr1.rewards.boxes import Box
from megatron_vlmr1.rewards.coordinates import to_original
from megatron_vlmr1.rewards.item import RewardFailure, RewardItem, check_length

# Integers as floats: one of a thousand digits makes its own box unusable, not the whole answer.
_DECODER = json.JSONDecoder(parse_int=float)


class Detection(NamedTuple):
    """A labelled box in pixels; `box` is None where it has no usable area, `label` is "" where there is none."""

    label: str
    box: Box | None


def parse(text: str) -> list[Detection] | None:
    """Return the labelled boxes of an answer's content, or None where it says neither boxes nor "none".

    Items of the list that are no labelled boxes stay in it, without a label or without a box.
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
    items = data if isinstance(data, list) else [data]
    return [_detection(item) for item in items] if isinstance(data, list | dict) else None


def truths(item: RewardItem) -> list[Detection]:
    """Return the true boxes, in pixels of the original image.

    Raises:
        RewardFailure: the solution holds no list of labelled boxes, or one of them is unusable.
    """
    tagged = answers.answer(item.solution)
    found = parse(item.solution if tagged is None else tagged)
    if found is None:
        raise RewardFailure("the solution is neither None nor a json list of labelled boxes")
    if any(not truth.label or usable(truth.box) is None for truth in found):
        raise RewardFailure("the solution has an item without a label or a box [x1, y1, x2, y2] with an area")
    return found


def predictions(item: RewardItem) -> list[Detection] | None:
    """Return the predicted boxes, in pixels of the original image, or None where the completion answers nothing.

    Raises:
        RewardFailure: a grid without the image's size.
    """
    scale = to_original(item)
    answer = answers.answer(item.completion)
    found = parse(answer) if answer is not None else None
    if found is None:
        return None
    return [Detection(label, usable(scale(box)) if box is not None else None) for label, box in found]


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


def usable(box: Box | None) -> Box | None:
    """Return the box if it has an area that COCO would count, else None."""
    return box if box is not None and 0 < boxes.area(box) <= MAX_AREA else None


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


def _detection(item: Any) -> Detection:
    if not isinstance(item, dict):
        return Detection("", None)
    label, box = item.get("label"), item.get("bbox_2d")
    return Detection(
        " ".join(label.casefold().split()) if isinstance(label, str) else "",
        (box[0], box[1], box[2], box[3])
        if isinstance(box, list) and len(box) == 4 and all(type(number) is float for number in box)
        else None,
    )
