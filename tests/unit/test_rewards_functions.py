"""Reward functions: the published cases, each quirk and its mend, hostile text."""

from __future__ import annotations

import json
import math
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_vlmr1.rewards import answers, boxes, functions
from megatron_vlmr1.rewards.functions.iou import published_iou
from megatron_vlmr1.rewards.item import MAX_TEXT_BYTES, RewardFailure, RewardItem

CASES = json.loads((Path(__file__).parent / "data" / "reward_cases_rec.json").read_text())["cases"]
REWARD_OF = {"qwen.iou_reward": "iou", "format_reward": "format", "qwen.format_reward_rec": "format_rec"}
REC = ("format", "format_rec", "iou")
SAME = {"image_size": (560, 560), "grid_thw": (1, 40, 40)}  # resized image as large as the original


def reward(name: str, completion: str, solution: str = "[100, 100, 300, 300]", **rest: Any) -> float:
    return functions.get(name)(RewardItem(completion, solution, **rest))


def published(name: str, completion: str, solution: str = "<answer> [100, 100, 300, 300] </answer>") -> float:
    return reward(name, completion, solution, compat="vlm-r1", **SAME)


def said(text: str) -> str:
    return f"<think>t</think><answer>{text}</answer>"


def reference_iou(a: boxes.Box, b: boxes.Box) -> float:
    """By counting the cells of an integer grid."""
    cells_a = {(x, y) for x in range(int(a[0]), int(a[2])) for y in range(int(a[1]), int(a[3]))}
    cells_b = {(x, y) for x in range(int(b[0]), int(b[2])) for y in range(int(b[1]), int(b[3]))}
    union = cells_a | cells_b
    return len(cells_a & cells_b) / len(union) if union else 0.0


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_published_case(case: dict[str, Any]) -> None:
    given = case["inputs"]
    if case["function"] == "iou":
        if case.get("raises"):
            with pytest.raises(ZeroDivisionError):
                published_iou(given["box1"], given["box2"])
        else:
            assert published_iou(given["box1"], given["box2"]) == pytest.approx(case["expected"], abs=1e-9)
        return
    item = RewardItem.parse(
        {
            "completion": given["completion"],
            "solution": given.get("solution", ""),
            "image_size": [given["image_width"], given["image_height"]] if "image_width" in given else None,
            "grid_thw": given.get("image_grid_thw"),
            "compat": "vlm-r1",
        }
    )
    assert functions.get(REWARD_OF[case["function"]])(item) == pytest.approx(case["expected"], abs=1e-9)


# The published functions once more, written down from their description with the standard library's regexes.
PUBLISHED_FORMAT = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)
PUBLISHED_FORMAT_REC = re.compile(
    r"<think>.*?</think>\s*<answer>.*?\{.*\[\d+,\s*\d+,\s*\d+,\s*\d+\].*\}.*?</answer>", re.DOTALL
)


def published_reward(completion: str, truth: list[float], size: tuple[int, int], grid: tuple[int, int, int]) -> float:
    tag = re.search(r"<answer>(.*?)</answer>", completion, re.DOTALL)
    match = re.search(r"\[(\d+),\s*(\d+),\s*(\d+),\s*(\d+)]", tag[1].strip()) if tag else None
    if match is None:
        return 0.0
    x, y = size[0] / (grid[2] * 14), size[1] / (grid[1] * 14)
    box = [int(match[1]) * x, int(match[2]) * y, int(match[3]) * x, int(match[4]) * y]
    width = min(box[2], truth[2]) - max(box[0], truth[0])
    height = min(box[3], truth[3]) - max(box[1], truth[1])
    shared = width * height if width > 1 and height > 1 else 0.0
    union = (box[2] - box[0]) * (box[3] - box[1]) + (truth[2] - truth[0]) * (truth[3] - truth[1]) - shared
    return shared / union if union else 0.0


def test_compat_on_random_text() -> None:
    """20,000 texts put together from what matters to the patterns."""
    rng = random.Random(0)
    parts = [
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
        " ",
        "\n",
        "\u3000",
        "{",
        "}",
        "[1, 2,3,\n40]",
        "[10,20,300,40",
    ]
    parts += [
        "]",
        "[-1, 2, 3, 4]",
        "[1.5,2,3,4]",
        "[ 1,2,3,4]",
        "[\u0663,0,\uff19\uff10,90]",
        "x",
        "\ud800",
        "<answer",
        "[[",
    ]
    well = ["<think>", "x", "</think>", " ", "<answer>", "{", "[10, 20, 300, 40]", "}", "</answer>"]
    truth, size, grid = [5, 8, 250, 60], (640, 480), (1, 34, 46)
    counts = {"format": 0, "format_rec": 0, "iou": 0}
    for _ in range(20_000):
        pieces = list(well) if rng.random() < 0.5 else rng.choices(parts, k=rng.randrange(14))
        for _ in range(rng.randrange(3)):
            pieces.insert(rng.randrange(len(pieces) + 1), rng.choice(parts))
        text = "".join(pieces)
        item = RewardItem(text, f"<answer> {truth} </answer>", size, grid, "vlm-r1")
        expected = {
            "format": float(PUBLISHED_FORMAT.fullmatch(text) is not None),
            "format_rec": float(PUBLISHED_FORMAT_REC.search(text) is not None),
            "iou": published_reward(text, truth, size, grid),
        }
        for name, value in expected.items():
            assert functions.get(name)(item) == pytest.approx(value, abs=1e-9), (name, text)
            counts[name] += value > 0
    assert min(counts.values()) > 1000, counts


def test_iou_counts_cells() -> None:
    rng = random.Random(1)
    for _ in range(500):
        x1, y1, a1, b1 = (rng.randrange(30) for _ in range(4))
        predicted = (x1, y1, x1 + rng.randrange(20), y1 + rng.randrange(20))
        truth = (a1, b1, a1 + 1 + rng.randrange(20), b1 + 1 + rng.randrange(20))
        value = reward("iou", said(json.dumps(predicted)), json.dumps(truth))
        assert value == pytest.approx(reference_iou(predicted, truth), abs=1e-12)


def test_iou_scales_the_prediction_only() -> None:
    """The resized image is 46 * 14 = 644 wide and 34 * 14 = 476 high; the original is twice and half that."""
    size, grid = (1288, 238), (1, 34, 46)
    assert reward("iou", said("[10, 20, 110, 220]"), "[20, 10, 220, 110]", image_size=size, grid_thw=grid) == 1.0
    assert reward("iou", said("[20, 10, 220, 110]"), "[20, 10, 220, 110]", image_size=size, grid_thw=grid) < 0.4


@pytest.mark.parametrize(
    ("answer", "truth", "quirk", "mended"),
    [
        # An overlap of at most one pixel: 1 * 200 of 200 * 200 + 201 * 200 - 200.
        ("[299, 100, 500, 300]", "[100, 100, 300, 300]", 0.0, 1 / 400),
        ("[100, 100, 101, 300]", "[100, 100, 101, 300]", 0.0, 1.0),
        # Ways to write a number.
        ("[100.0, 100.0, 300.0, 300.0]", "[100, 100, 300, 300]", 0.0, 1.0),
        ("[-100, 100, 300, 300]", "[100, 100, 300, 300]", 0.0, 0.5),
        ("[ 100, 100, 300, 300 ]", "[100, 100, 300, 300]", 0.0, 1.0),
        ("[100 ,100 ,300 ,300]", "[100, 100, 300, 300]", 0.0, 1.0),
        ("[1e2, 1E2, 3e2, +300.]", "[100, 100, 300, 300]", 0.0, 1.0),
        # Ways to write the truth.
        ("[100, 100, 300, 300]", '{"bbox_2d": [100, 100, 300, 300]}', 0.0, 1.0),
    ],
)
def test_iou_quirks_and_mends(answer: str, truth: str, quirk: float, mended: float) -> None:
    assert published("iou", said(answer), f"<answer>{truth}</answer>") == quirk
    assert reward("iou", said(answer), truth, **SAME) == pytest.approx(mended, abs=1e-12)
    assert reward("iou", said(answer), f"<answer> {truth} </answer>", **SAME) == pytest.approx(mended, abs=1e-12)


@pytest.mark.parametrize(
    "answer", ["[300, 100, 100, 300]", "[300, 300, 100, 100]", "[5, 5, 5, 5]", "[200, 0, 200, 500]"]
)
def test_iou_without_area_is_zero(answer: str) -> None:
    assert reward("iou", said(answer), **SAME) == 0.0


@pytest.mark.parametrize(
    "text", ["", "[100, 100, 300, 300]", said(""), said("[1, 2, 3]"), "<answer>[100, 100, 300, 300]"]
)
def test_iou_without_an_answer_is_zero(text: str) -> None:
    assert reward("iou", text, **SAME) == published("iou", text) == 0.0


@pytest.mark.parametrize(
    "truth", ["", "None", "[1, 2, 3]", "[5, 5, 5, 9]", "[9, 9, 1, 1]", "[NaN, 0, 1, 1]", "[0, 0, 1e400, 1]"]
)
def test_iou_without_a_truth_fails(truth: str) -> None:
    with pytest.raises(RewardFailure, match="no box"):
        reward("iou", said("[100, 100, 300, 300]"), truth, **SAME)


@pytest.mark.parametrize(
    "truth", ["[100, 100, 300, 300]", "<answer>none</answer>", "<answer>" + "[" * 100_000 + "</answer>"]
)
def test_iou_fails_where_the_published_raises(truth: str) -> None:
    with pytest.raises(RewardFailure, match="published reward raises"):
        published("iou", said("[100, 100, 300, 300]"), truth)


def test_iou_needs_the_image_size() -> None:
    answer = said("[100, 100, 300, 300]")
    for size, grid in ((None, (1, 40, 40)), ((560, 560), (1, 0, 40)), ((0, 560), (1, 40, 40))):
        with pytest.raises(RewardFailure, match="image_size"):
            reward("iou", answer, image_size=size, grid_thw=grid)
    with pytest.raises(RewardFailure, match="image_size"):
        reward("iou", answer, "<answer>[1, 1, 2, 2]</answer>", compat="vlm-r1")
    assert reward("iou", answer) == reward("iou", answer, image_size=(9, 9)) == 1.0  # pixels of the original


@pytest.mark.parametrize(
    ("text", "quirk", "mended"),
    [
        (" <think>t</think><answer>a</answer>\n", 0.0, 1.0),
        ("<think>t</think>\n \u3000<answer>a</answer>", 1.0, 1.0),
        ("<think></think><answer></answer>", 1.0, 1.0),
        ("<think>t</think><answer>a</answer><answer>b</answer>", 1.0, 0.0),
        ("<think>t</think><answer>a</answer><think>t</think><answer>b</answer>", 1.0, 0.0),
        ("<think>a<think>b</think><answer>c</answer>", 1.0, 0.0),
        ("<think>t</think>so<answer>a</answer>", 0.0, 0.0),
        ("<answer>a</answer><think>t</think>", 0.0, 0.0),
        ("<think>t<answer>a</answer></think>", 0.0, 0.0),
        ("<think>t</think>a", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_format_quirks_and_mends(text: str, quirk: float, mended: float) -> None:
    assert published("format", text) == quirk
    assert reward("format", text) == mended


@pytest.mark.parametrize(
    ("text", "quirk", "mended"),
    [
        (said('{"bbox_2d": [1, 2, 3, 4]}'), 1.0, 1.0),
        (said('{"bbox_2d": [1.5, -2, 3, 4]}'), 0.0, 1.0),
        ("junk " + said('{"bbox_2d": [1, 2, 3, 4]}'), 1.0, 0.0),
        (said("{}") + said('{"a": [1, 2, 3, 4]}'), 1.0, 0.0),
        (said("[1, 2, 3, 4]"), 0.0, 0.0),
        (said("} [1, 2, 3, 4] {"), 0.0, 0.0),
    ],
)
def test_format_rec_quirks_and_mends(text: str, quirk: float, mended: float) -> None:
    assert published("format_rec", text) == quirk
    assert reward("format_rec", text) == mended


HOSTILE = {
    "brackets": "[",
    "tags": "<think></think><answer>",
    "thinks": "<think>",
    "boxed": "\\boxed{",
    "almost": "<think></think> <answer>{[1,1,1,",
    "digits": "9",
    "boxes": "[1, 2, 3, 4]",
    "nul": "\0",
    "surrogate": "\ud800",
    "right to left": "\u202e\u05d0[1,",
    "power": "9**9**9**9",
}


@pytest.mark.parametrize("compat", ["none", "vlm-r1"])
@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("name", REC)
def test_hostile_text(name: str, kind: str, compat: Any) -> None:
    """A value in [0, 1] or `too_long`, fast, and in linear time up to a megabyte."""
    for size, limit_s in ((MAX_TEXT_BYTES // 4, 0.25), (1_000_000, 0.5)):
        repeated = (HOSTILE[kind] * size)[:size]
        for text in (repeated, said(repeated), "<think></think><answer>" + repeated):
            start = time.process_time()
            try:
                value = functions.get(name)(
                    RewardItem(text, "<answer>[1, 1, 9, 9]</answer>", (56, 56), (1, 4, 4), compat)
                )
                assert 0 <= value <= 1
            except RewardFailure as failure:
                assert str(failure).startswith("too_long")
                assert compat == "none"
                assert len(text.encode("utf-8", "surrogatepass")) > MAX_TEXT_BYTES
            assert time.process_time() - start < limit_s


@pytest.mark.parametrize(
    "numbers", ["NaN, 0, 1, 1", "0, 0, 1e400, 9", "-1e308, -1e308, 1e308, 1e308", "9" * 5000 + ", 1, 2, 3"]
)
def test_extreme_numbers_are_no_overlap(numbers: str) -> None:
    assert reward("iou", said(f"[{numbers}]"), **SAME) == published("iou", said(f"[{numbers}]")) == 0.0


def test_the_limit_counts_bytes() -> None:
    for letter in ("x", "\u00e9", "\U0001f600"):
        fits = MAX_TEXT_BYTES // len(letter.encode())
        assert reward("format", letter * fits) == 0.0
        with pytest.raises(RewardFailure, match="too_long"):
            reward("format", letter * (fits + 1))


def test_random_text_never_raises() -> None:
    rng = random.Random(2)
    alphabet = "<>/thinkaswer[]{},.-+eE0123456789 \n\0\ud800\u0663\u3000\\"
    for _ in range(20_000):
        text = "".join(rng.choices(alphabet, k=rng.randrange(60)))
        for name in REC:
            assert 0 <= reward(name, said(text), **SAME) <= 1
            assert 0 <= published(name, said(text)) <= 1


def test_answers_reads_the_first_block() -> None:
    text = "<think> a </think> <answer> b </answer> <answer>c</answer>"
    assert (answers.thought(text), answers.answer(text)) == ("a", "b")
    assert answers.blocks(text, "answer") == [" b ", "c"]
    assert answers.thought("<think>open") is None
    assert answers.box("see [1, 2, 3] or [[4, 5.5, -6, 7]]") == (4.0, 5.5, -6.0, 7.0)


def test_boxes() -> None:
    assert boxes.to_original((10, 20, 30, 40), (1, 10, 5), (140, 70)) == (20, 10, 60, 20)
    assert boxes.iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert boxes.iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0.0
    assert math.isfinite(boxes.iou((-1e308, 0, 1e308, 1e308), (0, 0, 1, 1)))


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="no reward named nope; known: .*format, format_rec, .*iou"):
        functions.get("nope")
    assert set(REC) < set(functions.names())


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([], "an item is an object"),
        ({"completion": "", "solution": "", "grid": [1, 2, 3]}, "unknown key grid; known: completion"),
        ({"completion": 3, "solution": ""}, "completion must be a string"),
        ({"completion": ""}, "solution must be a string"),
        ({"completion": "", "solution": "", "image_size": [1, 2.0]}, "image_size must be 2 integers"),
        ({"completion": "", "solution": "", "image_size": [1, True]}, "image_size must be 2 integers"),
        ({"completion": "", "solution": "", "grid_thw": [1, -2, 3]}, "grid_thw must be 3 integers"),
        ({"completion": "", "solution": "", "grid_thw": [1, 2, 10**30]}, "grid_thw must be 3 integers"),
        ({"completion": "", "solution": "", "compat": "other"}, "compat must be one of none, vlm-r1"),
    ],
)
def test_item_is_validated(raw: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        RewardItem.parse(raw)


def test_item_travels() -> None:
    item = RewardItem("a\ud800", "b", (3, 4), (1, 2, 3), "vlm-r1")
    assert RewardItem.parse(item.to_wire()) == item
