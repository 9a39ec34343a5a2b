"""The detection rewards: the published values, each quirk beside its mend, and the reward hack of the paper."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import pytest

from megatron_vlmr1.rewards import detections, functions
from megatron_vlmr1.rewards.average_precision import THRESHOLDS
from megatron_vlmr1.rewards.functions.iou import published_iou
from megatron_vlmr1.rewards.functions.weighted_sum import published_detection_score
from megatron_vlmr1.rewards.item import RewardFailure, RewardItem
from megatron_vlmr1.rewards.mean_precision import AP50
from megatron_vlmr1.rewards.published_detections import calculate_map

ROOT = Path(__file__).resolve().parents[2]
CASES = json.loads((Path(__file__).parent / "data" / "reward_cases_detection.json").read_text())["cases"]
PRECISIONS = ("map", "od_ap", "od_ap50", "odLength")
DETECTION = (*PRECISIONS, "weighted_sum")

CAT, DOG, OTHER = [10, 10, 110, 110], [200, 200, 300, 300], [400, 400, 500, 500]
BOTH = [("cat", CAT), ("dog", DOG)]


def listed(boxes: list[Any]) -> str:
    return json.dumps([{"bbox_2d": box, "label": label} for label, box in boxes])


def fenced(boxes: list[Any]) -> str:
    return f"```json\n{listed(boxes)}\n```"


def said(text: str) -> str:
    return f"<think>t</think><answer>{text}</answer>"


def reward(name: str, answer: str, truth: str, **rest: Any) -> float:
    return functions.get(name)(RewardItem(said(answer), f"<answer> {truth} </answer>", **rest))


def published(name: str, answer: str, truth: str) -> float:
    return reward(name, answer, truth, compat="vlm-r1")


def published_value(case: dict[str, Any]) -> float:
    given, function = case["inputs"], case["function"]
    if function == "calculate_map":
        thresholds = AP50 if given["score_type"] == 1 else THRESHOLDS
        return calculate_map(given["pred_bbox_list"], given["gt_bbox_list"], thresholds)
    if function == "detection_score":
        weights = {key: given[key] for key in ("alpha", "beta", "gamma") if key in given}
        return published_detection_score(given["content"], given["sol"], **weights)
    raw = {"completion": given["completion"], "solution": given.get("solution", ""), "compat": "vlm-r1"}
    if function == "accuracy_reward":
        return functions.get(given["accu_reward_method"])(RewardItem.parse(raw))
    family, kind = function.split(".")
    name = {"iou_reward": "iou", "format_reward_rec": "format_rec"}[kind]
    return functions.get(name)(RewardItem.parse(raw | {"family": family}))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_published_case(case: dict[str, Any]) -> None:
    if case["expected"] is None:
        with pytest.raises(RewardFailure, match="published reward raises"):
            published_value(case)
    else:
        assert published_value(case) == pytest.approx(case["expected"], abs=1e-9)


@pytest.mark.parametrize("name", DETECTION)
def test_a_perfect_answer(name: str) -> None:
    for answer in (fenced(BOTH), fenced(BOTH[::-1])):
        assert reward(name, answer, fenced(BOTH)) == pytest.approx(1.0, abs=1e-9)
        assert published(name, answer, fenced(BOTH)) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize(
    ("answer", "quirk", "mended"),
    [
        # Ways to write the list.
        (listed(BOTH), 0.0, 1.0),
        (f"```\n{listed(BOTH)}\n```", 0.0, 1.0),
        (f"```python\n{listed(BOTH)}\n```", 0.0, 1.0),
        (f"```json {listed(BOTH)}```", 1.0, 1.0),
        (f"Here: {fenced(BOTH)} Done.", 1.0, 1.0),
        (f"{fenced(BOTH[:1])} {fenced(BOTH)}", 1.0, 0.5),
        # Labels.
        (fenced([("Cat", CAT), ("  DOG ", DOG)]), 0.0, 1.0),
        (fenced([("dog", CAT), ("cat", DOG)]), 0.0, 0.0),
        # A class that the truth lacks counts in the mean over classes.
        (fenced([*BOTH, ("bird", OTHER)]), 1.0, 2 / 3),
        (fenced([*BOTH, (None, OTHER)]), 1.0, 2 / 3),
        # Surplus and unusable boxes: behind the right ones, where the published precision does not see them.
        (fenced([*BOTH, ("cat", CAT)]), 1.0, 0.75),
        (fenced([*BOTH, ("cat", OTHER)]), 1.0, 0.75),
        (fenced([*BOTH, ("cat", [110, 110, 10, 10])]), 1.0, 0.75),
        # In front of the right ones: a malformed box vanishes, a wrong one halves the precision of its class.
        (fenced([("cat", [1, 2, 3]), *BOTH]), 1.0, 0.625),
        (fenced([("cat", OTHER), *BOTH]), 0.75, 0.625),
    ],
)
def test_precision_quirks_and_mends(answer: str, quirk: float, mended: float) -> None:
    for name in ("map", "od_ap", "od_ap50"):
        assert published(name, answer, fenced(BOTH)) == pytest.approx(quirk, abs=1e-9), name
        assert reward(name, answer, fenced(BOTH)) == pytest.approx(mended, abs=1e-9), name


@pytest.mark.parametrize(
    ("answer", "quirk", "mended"),
    [
        (fenced(BOTH * 3), 1 / 3, 1 / 3),
        (fenced([*BOTH, (None, "x"), ("bird", OTHER)]), 0.5, 0.5 * 0.5),  # two classes that the truth lacks
        (fenced([("cat", CAT), ("cat", CAT)]), 0.5, 0.5),  # no more boxes than truths: free
        (fenced([("cat", CAT), ("bird", DOG)]), 0.5, 1 / 3),
    ],
)
def test_odlength_quirks_and_mends(answer: str, quirk: float, mended: float) -> None:
    assert published("odLength", answer, fenced(BOTH)) == pytest.approx(quirk, abs=1e-9)
    assert reward("odLength", answer, fenced(BOTH)) == pytest.approx(mended, abs=1e-9)


@pytest.mark.parametrize(
    ("answer", "quirk", "mended"),
    [
        (fenced([("dog", CAT), ("cat", DOG)]), 0.3, 0.0),  # a wrong label matches
        (fenced([("cat", CAT), ("x", DOG)]), 0.7 / 2 + 0.3, 0.7 / 2 + 0.3 / 2),
        (fenced([("a cat", CAT), ("dog", DOG)]), 0.7 / 2 + 0.3, 0.7 / 2 + 0.3 / 2),
        (listed(BOTH), 0.0, 1.0),
        (fenced([("Cat ", CAT), ("DOG", DOG)]), 0.7 / 2 + 0.3, 1.0),
        (fenced([*BOTH, ("cat", CAT)]), 0.7 + 0.3 * (1 - 1 / 6), 0.7 + 0.3 * (1 - 1 / 6)),
        (f"{fenced(BOTH[:1])} {fenced(BOTH)}", 0.7 / 2 + 0.3 * 0.75, 0.7 / 2 + 0.3 * 0.75),  # first fence
    ],
)
def test_weighted_sum_quirks_and_mends(answer: str, quirk: float, mended: float) -> None:
    assert published("weighted_sum", answer, fenced(BOTH)) == pytest.approx(quirk, abs=1e-9)
    assert reward("weighted_sum", answer, fenced(BOTH)) == pytest.approx(mended, abs=1e-9)


def test_weighted_sum_without_a_label() -> None:
    answer = '```json\n[{"bbox_2d": [10, 10, 110, 110]}]\n```'
    with pytest.raises(RewardFailure, match="published reward raises"):
        published("weighted_sum", answer, fenced(BOTH))
    assert reward("weighted_sum", answer, fenced(BOTH)) == 0.0


def test_weighted_sum_of_a_narrow_overlap() -> None:
    narrow = fenced([("cat", [5, 5, 6, 50])])
    assert published("weighted_sum", narrow, narrow) == 0.0
    assert reward("weighted_sum", narrow, narrow) == 1.0


def test_weighted_sum_matches_the_largest_overlap_first() -> None:
    """The second prediction fits both truths, better the first one's; order in the list does not matter."""
    truth = [("cat", [0, 0, 100, 100]), ("cat", [0, 20, 100, 120])]
    answer = [("cat", [0, 15, 100, 115]), ("cat", [0, 0, 100, 100])]
    expected = 0.7 * (1.0 + 95 / 105) / 2 + 0.3
    for boxes in (answer, answer[::-1]):
        assert reward("weighted_sum", fenced(boxes), fenced(truth)) == pytest.approx(expected, abs=1e-9)
        assert published("weighted_sum", fenced(boxes), fenced(truth)) == pytest.approx(expected, abs=1e-9)


def naive_weighted_sum(predicted: list[Any], truth: list[Any]) -> float:
    """As described: again and again the first largest overlap of what is left. Raises where a match has no label."""

    def overlap(a: Any, b: Any) -> float:
        try:
            return published_iou(a["bbox_2d"], b["bbox_2d"])
        except Exception:
            return 0.0

    left = {(i, j): overlap(a, b) for i, a in enumerate(predicted) for j, b in enumerate(truth)}
    matches, position = 0, 0.0
    while left:
        best = max(left, key=lambda pair: (left[pair], -pair[0], -pair[1]))
        if left[best] < 0.5:
            break
        position += left[best] * (predicted[best[0]]["label"].lower() == truth[best[1]]["label"].lower())
        matches += 1
        left = {pair: value for pair, value in left.items() if pair[0] != best[0] and pair[1] != best[1]}
    missed, false = len(truth) - matches, len(predicted) - matches
    return 0.7 * position / len(truth) + 0.3 * (1 - (missed / len(truth) + false / len(predicted)) / 2)


def test_published_weighted_sum_on_random_scenes() -> None:
    rng = random.Random(2)
    counts = {"raises": 0, "value": 0}
    odd = [{"label": "a"}, {"bbox_2d": [0, 0, 9], "label": "a"}, "text", 3, [1], {"bbox_2d": ["0", 0, 9, 9]}]

    def item() -> Any:
        x, y = rng.randrange(3), rng.choice([0, 1, rng.uniform(0, 8)])
        corners = [x, y, x + rng.choice([-5, 1, 9, 9, 12]), y + rng.choice([1.5, 9, 9, 12])]
        if rng.random() < 0.03:
            corners[rng.randrange(4)] = rng.choice([10**400, 1e200, True, 2**60, None])
        return rng.choice(odd) if rng.random() < 0.1 else {"bbox_2d": corners, "label": rng.choice("abA")}

    for _ in range(2000):
        predicted, truth = ([item() for _ in range(rng.randrange(1, 8))] for _ in range(2))
        if rng.random() < 0.1:
            predicted[0] = {"bbox_2d": [0, 0, 12, 12]}
        texts = [f"```json{json.dumps(items)}```" for items in (predicted, truth)]
        try:
            expected = naive_weighted_sum(predicted, truth)
        except (KeyError, AttributeError):
            counts["raises"] += 1
            with pytest.raises(RewardFailure, match="published reward raises"):
                published_detection_score(*texts)
        else:
            assert published_detection_score(*texts) == pytest.approx(expected, abs=1e-9)
            counts["value"] += expected > 0.3
    assert min(counts.values()) > 50, counts


@pytest.mark.parametrize("name", DETECTION)
@pytest.mark.parametrize(
    ("answer", "mended"),
    [("None", 1.0), ("none.", 1.0), ("```json\n[]\n```", 1.0), ("[]", 1.0), ("nothing here", 0.0), ("{}", 0.0)],
)
def test_truth_none(name: str, answer: str, mended: float) -> None:
    """Published, any text without a readable list agrees with it (but weighted_sum wants the word)."""
    for truth in ("None", "none.", "[]"):
        assert reward(name, answer, truth) == mended
        assert reward(name, fenced(BOTH), truth) == 0.0
    expected = float(answer in ("None", "none.")) if name == "weighted_sum" else 1.0
    assert published(name, answer, "None") == expected
    assert published(name, fenced(BOTH), "None") == 0.0


@pytest.mark.parametrize("name", DETECTION)
def test_which_answer_counts(name: str) -> None:
    """By default the first block; published, the last."""
    text = said(fenced(BOTH)) + said(fenced([("cat", OTHER)]))
    truth = f"<answer> {fenced(BOTH)} </answer>"
    assert functions.get(name)(RewardItem(text, truth)) == pytest.approx(1.0, abs=1e-9)
    assert functions.get(name)(RewardItem(text, truth, compat="vlm-r1")) == 0.0


@pytest.mark.parametrize("name", DETECTION)
@pytest.mark.parametrize("text", ["", fenced(BOTH), f"<answer>{fenced(BOTH)}", said("[1, 2"), said("true"), said("3")])
def test_no_readable_answer_is_zero(name: str, text: str) -> None:
    assert functions.get(name)(RewardItem(text, fenced(BOTH))) == 0.0


@pytest.mark.parametrize("name", DETECTION)
@pytest.mark.parametrize(
    "truth",
    [
        "",
        "a cat",
        "[1, 2, 3, 4]",
        '[{"bbox_2d": [1, 2, 3, 4]}]',
        '[{"label": "cat"}]',
        listed([("cat", [110, 10, 10, 110])]),
        listed([("cat", [5, 5, 5, 9])]),
        '[{"bbox_2d": [1, 2, 1e400, 4], "label": "cat"}]',
        listed([("cat", CAT)] * (detections.MAX_TRUTHS + 1)),
    ],
)
def test_without_a_usable_truth_it_fails(name: str, truth: str) -> None:
    with pytest.raises(RewardFailure, match="the solution"):
        reward(name, fenced(BOTH), truth)


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize(
    "truth",
    [
        "```json\n[{\n```",
        "```json\n3\n```",
        '```json\n["cat"]\n```',
        '```json\n{"bbox_2d": [1, 2, 3, 4], "label": "cat"}\n```',
        '```json\n[{"bbox_2d": [1, 2, 3, 4]}]\n```',
        '```json\n[{"bbox_2d": [1, 2, 3], "label": "cat"}]\n```',
        '```json\n[{"bbox_2d": ["1", "2", "3", "4"], "label": "cat"}]\n```',
        '```json\n[{"bbox_2d": [1, 2, 3, 4], "label": ["cat"]}]\n```',
        '```json\n[{"bbox_2d": [1, 2, 1' + "0" * 400 + ', 4], "label": "cat"}]\n```',
    ],
)
def test_it_fails_where_the_published_raises(name: str, truth: str) -> None:
    with pytest.raises(RewardFailure, match="the published reward raises"):
        published(name, fenced([("cat", CAT)]), truth)


def test_a_reversed_truth() -> None:
    truth = fenced([("cat", [110, 10, 10, 110])])
    for name in PRECISIONS:
        assert published(name, fenced([("cat", CAT)]), truth) == -1.0
        with pytest.raises(RewardFailure, match="the solution"):
            reward(name, fenced([("cat", CAT)]), truth)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400", "9" * 5000, '"10"', "null", "true"])
def test_an_impossible_number_costs_its_own_box_only(number: str) -> None:
    bad = f'{{"bbox_2d": [{number}, 10, 110, 110], "label": "cat"}}'
    answer = f"[{bad}, {listed(BOTH)[1:]}"
    assert reward("map", answer, fenced(BOTH)) == pytest.approx((0.5 * 0.5 + 1) / 2, abs=1e-9)


def test_predictions_are_scaled_back() -> None:
    """The resized image is 644 x 476 pixels; the original twice as wide, half as high. Published, nothing is scaled."""
    size = {"image_size": (1288, 238), "grid_thw": (1, 34, 46)}
    resized, original = fenced([("cat", [10, 20, 110, 220])]), fenced([("cat", [20, 10, 220, 110])])
    for name in DETECTION:
        assert reward(name, resized, original, **size) == pytest.approx(1.0, abs=1e-9)
        assert reward(name, original, original, **size) == 0.0
        assert reward(name, original, original, compat="vlm-r1", **size) == pytest.approx(1.0, abs=1e-9)
        for family in ("internvl", "glm"):
            assert reward(name, original, original, family=family, **size) == pytest.approx(1.0, abs=1e-9)
        with pytest.raises(RewardFailure, match="image_size"):
            reward(name, resized, original, grid_thw=(1, 34, 46))


def test_the_reward_hack_of_the_paper() -> None:
    """24 boxes for 3 objects: mAP does not see it, odLength does, and so do the default modes."""
    objects = [("cat", CAT), ("cat", DOG), ("cat", OTHER)]
    for answer, cost in ((fenced(objects * 8), 1 / 8), (fenced([*objects, *[("bird", CAT)] * 21]), 1 / 2)):
        assert published("map", answer, fenced(objects)) > 0.99
        assert published("odLength", answer, fenced(objects)) == pytest.approx(3 / 24, abs=1e-9)
        assert reward("map", answer, fenced(objects)) == pytest.approx(cost, abs=1e-9)
        assert reward("odLength", answer, fenced(objects)) <= 3 / 24
    assert published("weighted_sum", fenced(objects * 8), fenced(objects)) == pytest.approx(0.7 + 0.3 * 0.5625)


def test_the_page_on_reward_hacking_shows_what_the_functions_give() -> None:
    path = ROOT / "tools" / "draw_reward_hacking.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.table() in (ROOT / "docs" / "reward_hacking.md").read_text()
