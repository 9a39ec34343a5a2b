"""Hostile text before the rewards on boxes: in range or a failure, fast, and linear."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_vlmr1.rewards import functions
from megatron_vlmr1.rewards.item import MAX_TEXT_BYTES, RewardFailure, RewardItem

DETECTION = ("map", "od_ap", "od_ap50", "odLength", "weighted_sum")
REFERRING = ("iou", "giou", "diou", "format_rec")
NAMES = (*DETECTION, *REFERRING, "counting")
OBJECTS = [{"bbox_2d": [10, 10, 110, 110], "label": "cat"}, {"bbox_2d": [200, 200, 300, 300], "label": "dog"}]
SIZE = {"image_size": (560, 560), "grid_thw": (1, 40, 40)}


def truth(name: str) -> str:
    if name in DETECTION:
        return f"<answer> ```json\n{json.dumps(OBJECTS)}\n``` </answer>"
    return "<answer> [10, 10, 110, 110] </answer>" if name in REFERRING else "<answer> 3 </answer>"


def judged(name: str, text: str, compat: Any, solution: str = "", family: Any = "qwen2_5_vl") -> float | str:
    """The value, which is in range, or the reason of the failure."""
    try:
        item = RewardItem(text, solution or truth(name), **SIZE, compat=compat, family=family)
        value = functions.get(name)(item)
    except RewardFailure as failure:
        return str(failure)
    assert isinstance(value, float)
    assert math.isfinite(value)
    assert (-1 if compat == "vlm-r1" and name in DETECTION[:4] else 0) <= value <= 1
    return value


def distinct_boxes(size: int) -> str:
    box = '{"bbox_2d": [%d, %d, %d, %d], "label": "cat"}'
    boxes = (box % (i % 40, i // 40 % 40, 110 - i % 30, 110 - i // 30 % 30) for i in range(size // 50))
    return f"[{', '.join(boxes)}]"


HOSTILE: dict[str, Callable[[int], str]] = {
    "brackets": lambda size: "[" * size,
    "tags": lambda size: "<think></think><answer>" * (size // 23),
    "answers": lambda size: "<answer></answer>" * (size // 17),
    "fences": lambda size: "```json" * (size // 7),
    "lists": lambda size: "```json[]```" * (size // 12),
    "boxed": lambda size: "\\boxed{" * (size // 7),
    "nested braces": lambda size: '{"a":' * (size // 6) + "1" + "}" * (size // 6),
    "nested brackets": lambda size: "[" * (size // 2) + "]" * (size // 2),
    "digits": lambda size: "9" * size,
    "digits in a box": lambda size: f'[{{"bbox_2d": [{"9" * size}, 1, 2, 3], "label": "cat"}}]',
    "decimals in a box": lambda size: f'[{{"bbox_2d": [0.{"9" * size}, 1, 2, 3], "label": "cat"}}]',
    "numbers": lambda size: f"[{'1,' * (size // 2)}1]",
    "different numbers": lambda size: "1 2 " * (size // 4),
    "string": lambda size: f'"{"a" * size}"',
    "long label": lambda size: f'[{{"bbox_2d": [1, 1, 2, 3], "label": "{" a" * (size // 2)}"}}]',
    "equal boxes": lambda size: f"[{', '.join([json.dumps(OBJECTS[0])] * (size // 50))}]",
    "distinct boxes": distinct_boxes,
    "powers": lambda size: "9**9**9**9" * (size // 10),
    "line breaks": lambda size: "\n" * size,
    "nul": lambda size: "\0" * size,
    "surrogates": lambda size: "\ud800" * (size // 3),
    "right to left": lambda size: "\u202e\u05d0[1," * (size // 8),
}
PLACES = ("%s", "<think>t</think><answer>%s</answer>", "<think>t</think><answer>```json\n%s\n```</answer>")


def seconds(name: str, text: str, compat: Any) -> float:
    start = time.process_time()
    judged(name, text, compat)
    return time.process_time() - start


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_text_is_fast(kind: str) -> None:
    """In time of the processor: 50 ms (100 here, as others use it too), 500 ms for a megabyte."""
    for compat, size, limit_s in (("none", MAX_TEXT_BYTES - 200, 0.1), ("vlm-r1", 1_000_000, 0.5)):
        hostile = HOSTILE[kind](size)
        for place in PLACES:
            text = place.replace("%s", hostile)
            for name in NAMES:
                took = min(seconds(name, text, compat) for _ in range(1))
                if took > limit_s:  # a hiccup of the machine is not a slow function
                    took = min(seconds(name, text, compat) for _ in range(3))
                assert took <= limit_s, (name, compat, place)


@pytest.mark.parametrize("name", DETECTION)
@pytest.mark.parametrize("kind", ["lists", "numbers", "equal boxes", "distinct boxes", "string", "line breaks"])
def test_the_published_values_take_linear_time(kind: str, name: str) -> None:
    def least(size: int) -> float:
        text = PLACES[2].replace("%s", HOSTILE[kind](size))
        return min(seconds(name, text, "vlm-r1") for _ in range(3))

    ratios: list[float] = []
    while len(ratios) < 4 and min(ratios, default=9.0) > 2.5:  # again after a hiccup of the machine
        ratios.append(least(1_000_000) / max(least(500_000), 0.005))
    assert min(ratios) <= 2.5


@pytest.mark.parametrize("name", NAMES)
def test_beyond_the_limit_the_default_fails(name: str) -> None:
    assert str(judged(name, "x" * (MAX_TEXT_BYTES + 1), "none")).startswith("too_long")
    if name != "format_rec":
        assert str(judged(name, "x", "none", "x" * (MAX_TEXT_BYTES + 1))).startswith("too_long")


@pytest.mark.parametrize("name", DETECTION)
def test_a_huge_truth_is_fast_too(name: str) -> None:
    for compat, size in (("none", MAX_TEXT_BYTES - 200), ("vlm-r1", 1_000_000)):
        text = PLACES[2].replace("%s", distinct_boxes(size))
        start = time.process_time()
        assert str(judged(name, text, compat, text)).startswith("too_many")
        assert time.process_time() - start < 1.0


NUMBERS = st.one_of(
    st.integers(-50, 400).map(str),
    st.floats(width=32).map(str),
    st.sampled_from(["NaN", "Infinity", "-Infinity", "1e400", "1e308", "-1e308", "1e-320", "9" * 400, "true", "null"]),
    st.sampled_from(['"1"', "[1]", "{}", "1" + "0" * 5000]),
)
LABELS = st.sampled_from(['"cat"', '" CAT "', '"dog"', '"bird"', '""', "1", "true", "null", '["cat"]', "{}", "NaN"])
ITEMS = st.one_of(
    st.builds(
        lambda numbers, label: f'{{"bbox_2d": [{", ".join(numbers)}], "label": {label}}}',
        st.one_of(st.lists(NUMBERS, min_size=4, max_size=4), st.lists(NUMBERS, max_size=5)),
        LABELS,
    ),
    st.sampled_from([json.dumps(OBJECTS[0]), json.dumps(OBJECTS[1]), "[10, 10, 110, 110]", "3", "{}", '"label"']),
)
LISTS = st.lists(ITEMS, max_size=4).map(lambda items: f"[{', '.join(items)}]")
SOUP = st.lists(
    st.sampled_from(
        ["<think>", "</think>", "<answer>", "</answer>", "```json", "```", "\n", " ", "[", "]", "{", "}", ",", ":", '"']
        + ["None", "none.", "three", "3", "-7", "1,000", "\0", "\ud800", "\u3000", "\u202e", "\uff19", "\\boxed{"]
    )
    | ITEMS
    | st.text(max_size=5),
    max_size=8,
).map("".join)
TEXTS = st.builds(lambda place, body: place.replace("%s", body), st.sampled_from(PLACES), LISTS | ITEMS | SOUP)


SOLUTIONS = [
    "",
    "None",
    "[]",
    json.dumps(OBJECTS),
    "```json\n[3]\n```",
    '```json\n{"bbox_2d": [1, 2, 3, 4]}\n```',
    '```json\n[{"bbox_2d": [1e400, NaN, 3, true], "label": null}]\n```',
    "[0, 0, 1e308, 1e308]",
    "9" * 5000,
    "\ud800",
]


@settings(max_examples=2_000, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    text=TEXTS,
    solution=st.sampled_from([*SOLUTIONS, "usual", "same"]),
    family=st.sampled_from(["qwen2_5_vl", "internvl", "glm"]),
)
def test_any_text_gives_a_value_in_range_or_a_failure(text: str, solution: str, family: str) -> None:
    for name in NAMES:
        against = {"usual": truth(name), "same": text}.get(solution, f"<answer>{solution}</answer>")
        for compat in ("none", "vlm-r1"):
            judged(name, text, compat, against, family)
