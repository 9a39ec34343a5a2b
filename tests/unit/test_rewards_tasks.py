"""The rec task: what it asks, reads and measures."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megatron_vlmr1.rewards import functions, tasks
from megatron_vlmr1.rewards.item import RewardFailure
from megatron_vlmr1.types import ImagePatches, Prompt

REC = tasks.get("rec")


def prompt(truth: str, size: tuple[int, int] | None = (1120, 560)) -> Prompt:
    empty = np.zeros((0, 0), np.float32)
    images = (ImagePatches(empty, (1, 40, 40), size, b""),) if size else ()
    return Prompt(0, "k", np.zeros(0, np.int64), np.zeros((3, 0), np.int64), images, "q", truth)


def said(text: str) -> str:
    return f"<think>t</think><answer>{text}</answer>"


def test_template_is_the_published_one() -> None:
    question = (
        "Please provide the bounding box coordinate of the region this sentence describes: a {question} in braces"
    )
    assert REC.render(question) == (
        question + " First output the thinking process in <think> </think> tags and then output the final answer in"
        " <answer> </answer> tags. Output the final answer in JSON format."
    )


def test_recipe_names_known_rewards() -> None:
    assert REC.recipe == {"iou": 1.0, "format": 1.0}
    assert all(functions.get(name) for name in REC.recipe)


def test_parse_returns_original_pixels() -> None:
    text = said('{"bbox_2d": [50, 100, 150, 300]}')
    assert REC.parse(text, prompt("[100, 100, 300, 300]")) == (100.0, 100.0, 300.0, 300.0)
    assert REC.parse(text, prompt("", size=None)) == (50.0, 100.0, 150.0, 300.0)
    assert REC.parse(said("nothing"), prompt("")) is None
    assert REC.parse("[1, 2, 3, 4]", prompt("")) is None


@pytest.mark.parametrize(
    ("text", "iou", "acc50", "format_"),
    [
        (said("[50, 100, 150, 300]"), 1.0, 1.0, 1.0),
        ("<answer>[50, 100, 150, 300]</answer>", 1.0, 1.0, 0.0),
        (said("[100, 100, 200, 300]"), 1 / 3, 0.0, 1.0),
        (said("[50, 100, 100, 300]"), 0.5, 0.0, 1.0),  # one half does not exceed one half
        ("nonsense", 0.0, 0.0, 0.0),
    ],
)
def test_metrics(text: str, iou: float, acc50: float, format_: float) -> None:
    expected = {"iou": pytest.approx(iou), "acc50": acc50, "format": format_}
    assert REC.metrics(text, prompt("[100, 100, 300, 300]")) == expected
    assert set(REC.aggregates.values()) == set(expected)


def test_metrics_of_a_bad_truth_fail() -> None:
    with pytest.raises(RewardFailure, match="no box"):
        REC.metrics(said("[1, 2, 3, 4]"), prompt("none"))


@pytest.mark.parametrize("truth", ["[100, 100, 300, 300]", "<answer> [100, 100, 300, 300] </answer>"])
def test_compat_item_is_tagged_like_the_published_rows(truth: str) -> None:
    item = REC.item(said("[50, 100, 150, 300]"), prompt(truth), "vlm-r1")
    assert json.loads(item.solution.removeprefix("<answer>").removesuffix("</answer>")) == [100, 100, 300, 300]
    assert functions.get("iou")(item) == 1.0


def test_unknown_task() -> None:
    with pytest.raises(ValueError, match="no task named ocr; known: rec"):
        tasks.get("ocr")
