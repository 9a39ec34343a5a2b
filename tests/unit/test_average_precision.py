"""Our average precision against pycocotools, on random scenes and on the numbers that a model may write."""

from __future__ import annotations

import contextlib
import io
import math
import random
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval, Params

from megatron_vlmr1.rewards import average_precision as ap
from megatron_vlmr1.rewards.item import RewardFailure
from megatron_vlmr1.rewards.mean_precision import AP50
from megatron_vlmr1.rewards.published_detections import calculate_map

STRANGE = [math.nan, math.inf, -math.inf, 1e308, -1e308, 1e-200, 1e5, 2e5, 10**20, 10**400, -5, 0, True, "1", None, [1]]


def labelled(box: list[Any], label: Any = "a") -> dict[str, Any]:
    return {"bbox_2d": box, "label": label}


def as_coco(box: list[Any]) -> dict[str, Any]:
    x, y, width, height = box[0], box[1], box[2] - box[0], box[3] - box[1]
    return {"image_id": 0, "bbox": [x, y, width, height], "area": width * height}


def by_pycocotools(predicted: list[Any], truth: list[Any]) -> tuple[float, float]:
    """AP@[.50:.95] and AP50 over the classes of the truth; all scores 1; predictions that raise are left out."""
    ids: dict[Any, int] = {}
    annotations = [
        as_coco(item["bbox_2d"])
        | {"id": index + 1, "category_id": ids.setdefault(item["label"], len(ids)), "iscrowd": 0}
        for index, item in enumerate(truth)
    ]
    coco = COCO()
    coco.dataset = {
        "images": [{"id": 0, "width": 2048, "height": 2048}],
        "categories": [{"id": number, "name": str(number)} for number in ids.values()],
        "annotations": annotations,
    }
    results = []
    for item in predicted:
        with contextlib.suppress(KeyError, TypeError, OverflowError):
            results.append(as_coco(item["bbox_2d"]) | {"category_id": ids[item["label"]], "score": 1.0})
    with contextlib.redirect_stdout(io.StringIO()), np.errstate(all="ignore"):
        coco.createIndex()
        if not results:
            return 0.0, 0.0
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats[0], evaluation.stats[1]


def random_box(rng: random.Random, side: int) -> list[Any]:
    x, y = rng.randrange(side), rng.uniform(0, side)
    return [x, y, x + rng.randrange(side), y + rng.choice([0, 1, rng.randrange(side), rng.uniform(0, side)])]


def strange_box(rng: random.Random, side: int) -> list[Any]:
    corners = [rng.randrange(side) for _ in range(4)]
    return [rng.choice(STRANGE) if rng.random() < 0.15 else corner for corner in corners]


def predictions(rng: random.Random, truth: list[Any], labels: list[Any], box: Any) -> list[Any]:
    found = []
    for _ in range(rng.choice([1, 3, 10, 40, 250])):
        corners = list(rng.choice(truth)["bbox_2d"]) if rng.random() < 0.6 else box()
        if rng.random() < 0.5:
            with contextlib.suppress(TypeError, OverflowError):
                corners = [corner + rng.gauss(0, 3) for corner in corners]
        found.append(labelled(corners, rng.choice([*labels, "unknown"])))
    return found


def test_the_constants_are_pycocotools() -> None:
    params = Params(iouType="bbox")
    assert params.iouThrs.tolist() == list(ap.THRESHOLDS)
    assert params.recThrs.tolist() == list(ap._RECALLS)
    assert params.areaRng[0] == [0, ap.MAX_AREA]
    assert params.maxDets[-1] == ap.MAX_DETECTIONS
    assert np.spacing(1) == ap._SPACING


def test_500_random_scenes_equal_pycocotools() -> None:
    """Crowded scenes, duplicates, unknown classes, boxes without area, more than 100 boxes of a class."""
    rng = random.Random(0)
    largest = 0.0
    positive = 0
    for _ in range(500):
        side = rng.choice([8, 30, 300])
        labels = list("abcdefgh"[: rng.choice([1, 2, 8])])
        truth = [labelled(random_box(rng, side), rng.choice(labels)) for _ in range(rng.choice([1, 2, 5, 20, 120]))]
        found = predictions(rng, truth, labels, lambda side=side: random_box(rng, side))
        expected = by_pycocotools(found, truth)
        ours = calculate_map(found, truth), calculate_map(found, truth, AP50)
        largest = max(largest, *(abs(a - b) for a, b in zip(ours, expected, strict=True)))
        positive += expected[0] > 0
    assert largest < 1e-9
    assert positive > 250


def test_strange_numbers_equal_pycocotools() -> None:
    """Reversed, huge, infinite and NaN boxes, labels of any kind, ignored truths; raising where it raises."""
    rng = random.Random(1)
    counts = {"raises": 0, "none": 0, "positive": 0}
    for _ in range(500):
        labels = rng.sample(["a", "b", 1, True, None, 1.0, "1"], k=3)
        truth_box = rng.choice([strange_box, random_box, random_box])
        truth = [labelled(truth_box(rng, 40), rng.choice(labels)) for _ in range(rng.choice([1, 3, 10]))]
        found = predictions(rng, truth, labels, lambda: strange_box(rng, 40))
        try:
            expected = by_pycocotools(found, truth)
        except (TypeError, OverflowError) as error:
            with pytest.raises(RewardFailure, match=type(error).__name__):
                calculate_map(found, truth)
            counts["raises"] += 1
            continue
        assert calculate_map(found, truth) == pytest.approx(expected[0], abs=1e-9)
        assert calculate_map(found, truth, AP50) == pytest.approx(expected[1], abs=1e-9)
        counts["none" if expected[0] < 0 else "positive"] += expected[0] != 0
    assert min(counts.values()) >= 5, counts


def test_what_the_area_range_ignores() -> None:
    whole, large, reversed_ = ap.rect(0, 0, 10, 10), ap.rect(0, 0, 1e5, 1e5 + 1), ap.rect(10, 0, 0, 10)
    assert ap.average_precision([whole], [large, reversed_]) is None
    assert ap.average_precision([large, whole], [large, whole]) == pytest.approx(1.0)
    assert ap.average_precision([large, reversed_, whole], [whole]) == pytest.approx(1.0)
    assert ap.average_precision([None, whole], [whole]) == pytest.approx(0.5)
    assert ap.average_precision([], [whole]) == 0.0


def test_hand_counted() -> None:
    """One of two truths after a wrong box: precision 1/2 at the 51 recalls up to one half."""
    truths = [ap.rect(0, 0, 10, 10), ap.rect(20, 20, 30, 30)]
    assert ap.average_precision([ap.rect(50, 50, 60, 60), truths[1]], truths) == pytest.approx(51 / 101 / 2)


def test_of_equal_overlaps_the_last_truth_is_matched() -> None:
    """So that a second box, which fits the last truth only, comes too late."""
    truth = [labelled([0, 0, 10, 10]), labelled([0, 4, 10, 14])]
    found = [labelled([0, 2, 10, 12]), labelled([0, 4, 10, 14])]
    assert calculate_map(found, truth, AP50) == pytest.approx(51 / 101, abs=1e-9)
    assert by_pycocotools(found, truth)[1] == pytest.approx(51 / 101, abs=1e-9)
