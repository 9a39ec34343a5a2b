"""The other rewards on boxes and their number: giou, diou, counting, and what differs between model families."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest

from megatron_vlmr1.rewards import functions
from megatron_vlmr1.rewards.item import RewardFailure, RewardItem

TRUTH = (100.0, 100.0, 300.0, 300.0)
BOX = "[100, 100, 300, 300]"
SAME = {"image_size": (560, 560), "grid_thw": (1, 40, 40)}
SCALED = {"image_size": (1120, 560), "grid_thw": (1, 40, 40)}


def said(text: str) -> str:
    return f"<think>t</think><answer>{text}</answer>"


def reward(name: str, answer: str, truth: str = BOX, **rest: Any) -> float:
    return functions.get(name)(RewardItem(said(answer), f"<answer> {truth} </answer>", **rest))


def by_definition(name: str, a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """GIoU and DIoU as their papers write them."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0, width) * max(0, height)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    wide, high = max(a[2], b[2]) - min(a[0], b[0]), max(a[3], b[3]) - min(a[1], b[1])
    if name == "giou":
        return shared / union - (wide * high - union) / (wide * high)
    apart = ((a[0] + a[2] - b[0] - b[2]) / 2) ** 2 + ((a[1] + a[3] - b[1] - b[3]) / 2) ** 2
    return shared / union - apart / (wide**2 + high**2)


@pytest.mark.parametrize("name", ["giou", "diou"])
def test_as_defined_and_moved_into_zero_to_one(name: str) -> None:
    rng = random.Random(0)
    for _ in range(500):
        x, y = rng.uniform(-500, 500), rng.uniform(-500, 500)
        box = (x, y, x + rng.uniform(1, 500), y + rng.uniform(1, 500))
        expected = (by_definition(name, box, TRUTH) + 1) / 2
        assert 0 <= expected <= 1
        assert reward(name, json.dumps(box)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", ["giou", "diou"])
def test_order_of_answers(name: str) -> None:
    """Exact, near, far, farther, none: each is worth more than the next."""
    answers = [BOX, "[110, 110, 310, 310]", "[400, 400, 600, 600]", "[4000, 4000, 4200, 4200]", "none"]
    values = [reward(name, answer) for answer in answers]
    assert values == sorted(values, reverse=True)
    assert values[0] == 1.0
    assert values[-2] > values[-1] == 0.0
    assert reward(name, "[300, 100, 100, 300]") == reward(name, "[5, 5, 5, 5]") == 0.0
    assert 0 <= reward(name, "[-1e308, -1e308, 1e308, 1e308]") <= 1


@pytest.mark.parametrize("name", ["iou", "giou", "diou"])
def test_scaled_for_qwen_only(name: str) -> None:
    assert reward(name, "[50, 100, 150, 300]", **SCALED) == pytest.approx(1.0)
    for family in ("internvl", "glm"):
        assert reward(name, BOX, family=family, **SCALED) == 1.0
        assert reward(name, BOX, family=family, grid_thw=(1, 40, 40)) == 1.0


@pytest.mark.parametrize("name", ["giou", "diou", "counting"])
def test_compat_changes_nothing_where_nothing_was_published(name: str) -> None:
    truth = "3" if name == "counting" else BOX
    for answer in (BOX, "[110, 110, 310, 310]", "2", ""):
        assert reward(name, answer, truth) == reward(name, answer, truth, compat="vlm-r1")


@pytest.mark.parametrize("name", ["giou", "diou"])
def test_without_a_truth_they_fail(name: str) -> None:
    with pytest.raises(RewardFailure, match="no box"):
        reward(name, BOX, "none")


@pytest.mark.parametrize(
    ("answer", "qwen", "internvl", "glm"),
    [
        (BOX, 1.0, 1.0, 1.0),
        ("[299, 100, 500, 300]", 0.0, 0.0, 1 / 400),
        ("[101, 100, 301, 300]", 199 / 201, 199 / 201, 199 / 201),
        ("[300, 100, 100, 300]", 0.0, 0.0, 0.0),
        ("[100.0, 100, 300, 300]", 0.0, 0.0, 0.0),
        ("9" * 5000, 0.0, 0.0, 0.0),
        ("[" + "9" * 5000 + ", 1, 2, 3]", 0.0, 0.0, 0.0),
    ],
)
def test_published_overlap_by_family(answer: str, qwen: float, internvl: float, glm: float) -> None:
    for family, expected in (("qwen2_5_vl", qwen), ("internvl", internvl), ("glm", glm)):
        value = reward("iou", answer, compat="vlm-r1", family=family, **SAME)
        assert value == pytest.approx(expected, abs=1e-9)
    for family in ("internvl", "glm"):
        assert reward("iou", BOX, compat="vlm-r1", family=family) == 1.0  # needs no image size
        with pytest.raises(RewardFailure, match="published reward raises"):
            reward("iou", BOX, "none", compat="vlm-r1", family=family)


def test_published_format_by_family() -> None:
    """On random texts, against the standard library's patterns written down from the description."""
    number = r"\[\d+,\s*\d+,\s*\d+,\s*\d+\]"
    published = {
        "internvl": re.compile(rf"<think>.*?</think>\s*<answer>.*?{number}.*?</answer>", re.DOTALL),
        "glm": re.compile(r"<think>.*?<answer>.*?</answer>", re.DOTALL),
    }
    rng = random.Random(1)
    parts = ["<think>", "</think>", "<answer>", "</answer>", " ", "\n", "x", "[1, 2,3, 4]", "[1.5, 2, 3, 4]", "\ud800"]
    counts = {0.0: 0, 1.0: 0}
    for _ in range(5000):
        pieces = ["<think>", "</think>", "<answer>", "[1, 2, 3, 4]", "</answer>"] if rng.random() < 0.5 else []
        for _ in range(rng.randrange(8)):
            pieces.insert(rng.randrange(len(pieces) + 1), rng.choice(parts))
        text = "".join(pieces)
        for family, pattern in published.items():
            item = RewardItem(text, "", compat="vlm-r1", family=family)
            expected = float(pattern.search(text) is not None)
            assert functions.get("format_rec")(item) == expected, (family, text)
            counts[expected] += 1
    assert min(counts.values()) > 1000


@pytest.mark.parametrize(("family", "bare"), [("qwen2_5_vl", 0.0), ("internvl", 1.0), ("glm", 1.0)])
def test_default_format_by_family(family: Any, bare: float) -> None:
    assert reward("format_rec", '{"bbox_2d": [1, 2, 3, 4]}', family=family) == 1.0
    assert reward("format_rec", "[[1, 2, 3, 4]]", family=family) == bare
    assert reward("format_rec", "hello", family=family) == 0.0


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        ("3", "3", 1.0),
        ("3.0", "3", 1.0),
        ("Three.", "3", 1.0),
        ("There are three (3) dogs", "3", 1.0),
        ("twenty", "20", 1.0),
        ("1,200", "1200", 1.0),
        ("none", "0", 1.0),
        ("[]", "0", 1.0),
        ("2", "4", 0.5),
        ("6", "4", 0.5),
        ("1", "0", 0.0),
        ("-3", "3", 0.0),
        ("9", "4", 0.0),
        ("2 or 3", "3", 0.0),
        ("3 " * 17, "3", 0.0),
        ("many", "3", 0.0),
        ("", "3", 0.0),
        ("9" * 400, "3", 0.0),
        ('```json\n[{"bbox_2d": [1, 2, 3, 4], "label": "a"}, {"bbox_2d": [5, 6, 7, 8], "label": "a"}]\n```', "2", 1.0),
        ("2", '[{"bbox_2d": [1, 2, 3, 4], "label": "a"}, {"bbox_2d": [5, 6, 7, 8], "label": "a"}]', 1.0),
        ("[3]", "3", 1.0),
    ],
)
def test_counting(answer: str, truth: str, expected: float) -> None:
    assert reward("counting", answer, truth) == expected
    assert functions.get("counting")(RewardItem(said(answer), truth)) == expected


@pytest.mark.parametrize("truth", ["", "many", "2 or 3", "-1", "9" * 400])
def test_counting_needs_a_true_number(truth: str) -> None:
    with pytest.raises(RewardFailure, match="no number"):
        reward("counting", "3", truth)
