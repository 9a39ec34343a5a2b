"""Figures of evaluations: against pycocotools, against values worked out by hand, and intervals that cover."""

from __future__ import annotations

import contextlib
import io
import math
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from megatron_vlmr1.evaluate.metrics import bootstrap, detection, ovdeval
from megatron_vlmr1.evaluate.metrics.average_precision import average_precisions, class_matches, resampled
from megatron_vlmr1.evaluate.metrics.scenes import Scene, hits

Item = tuple[list[float], str]


def row(predicted: list[Item], true: list[Item], category: str | None = None) -> dict[str, Any]:
    sides = [[{"bbox_2d": box, "label": label} for box, label in side] for side in (predicted, true)]
    return {"predicted": sides[0], "true": sides[1], "category": category}


def random_scene(rng: np.random.Generator) -> dict[str, Any]:
    """Up to 12 true boxes of 4 classes, of which most are answered: jittered, twice, as another class, or not."""
    true, predicted = [], []
    for _ in range(rng.integers(0, 13)):
        x, y, w, h = rng.integers(0, 80), rng.integers(0, 80), rng.integers(5, 60), rng.integers(5, 60)
        box, label = [float(x), float(y), float(x + w), float(y + h)], "abcd"[rng.integers(4)]
        true.append((box, label))
        for _ in range(rng.integers(0, 3)):
            jitter = rng.normal(0, 4, 4) if rng.random() < 0.8 else np.zeros(4)
            x1, y1, x2, y2 = (float(v) for v in np.array(box) + jitter)
            predicted.append(([x1, y1, max(x1, x2), max(y1, y2)], label if rng.random() < 0.9 else "e"))
    return row([predicted[i] for i in rng.permutation(len(predicted))], true)


def xywh(box: list[float]) -> list[float]:
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def pycoco(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """mAP and AP50 of all rows together."""
    ids = {label: i for i, label in enumerate(sorted({t["label"] for r in rows for t in r["true"]}), 1)}
    truth = [
        {"image_id": i, "category_id": ids[t["label"]], "bbox": xywh(t["bbox_2d"]), "iscrowd": 0}
        for i, r in enumerate(rows)
        for t in r["true"]
    ]
    truth = [{**t, "id": n, "area": t["bbox"][2] * t["bbox"][3]} for n, t in enumerate(truth, 1)]
    found = [
        {"image_id": i, "category_id": ids[p["label"]], "bbox": xywh(p["bbox_2d"]), "score": 1.0}
        for i, r in enumerate(rows)
        for p in r["predicted"]
        if p["label"] in ids
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "images": [{"id": i} for i in range(len(rows))],
            "categories": [{"id": i} for i in ids.values()],
            "annotations": truth,
        }
        coco.createIndex()
        run = COCOeval(coco, coco.loadRes(found), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return float(run.stats[0]), float(run.stats[1])


def test_average_precision_is_that_of_pycocotools() -> None:
    """500 random scenes in splits of 1 to 25 pictures."""
    rng = np.random.default_rng(0)
    scenes = [random_scene(rng) for _ in range(500)]
    start, compared = 0, 0
    for size in [1] * 100 + [5] * 40 + [25] * 8:
        rows = scenes[start : start + size]
        start += size
        if not any(r["true"] for r in rows) or not any(p["label"] != "e" for r in rows for p in r["predicted"]):
            continue
        known = {t["label"] for r in rows for t in r["true"]}
        if not any(p["label"] in known for r in rows for p in r["predicted"]):
            continue
        expected = pycoco(rows)
        found = detection.figures(rows)
        assert (found["map"], found["ap50"]) == pytest.approx(expected, abs=1e-6)
        some = [Scene.of_row(r) for r in rows]
        drawn = resampled(class_matches(some), np.ones((1, len(rows))))[0]
        assert drawn == pytest.approx(expected, abs=1e-9)
        compared += 1
    assert start == 500 and compared > 130


def test_a_reversed_prediction_is_a_false_alarm() -> None:
    rows = [row([([10.0, 0.0, 0.0, 10.0], "a"), ([0.0, 0.0, 10.0, 10.0], "a")], [([0.0, 0.0, 10.0, 10.0], "a")])]
    assert detection.figures(rows)["map"] == pytest.approx(0.5)
    assert detection.figures(rows)["greedy_precision"] == pytest.approx(0.5)


def test_a_hundred_and_one_detections() -> None:
    """COCO looks at the first hundred of a class and picture only."""
    box, away = [0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0]
    late = [row([(away, "a")] * 100 + [(box, "a")], [(box, "a")])]
    assert detection.figures(late)["map"] == 0 == pycoco(late)[0]
    assert detection.figures(late)["greedy_recall"] == 1
    assert detection.figures([row([(away, "a")] * 99 + [(box, "a")], [(box, "a")])])["map"] == pytest.approx(0.01)


def test_matches_of_open_vocabularies_grow_with_the_boxes() -> None:
    """Not with pictures times classes."""
    scenes = [Scene.of_row(row([([0.0, 0.0, 9.0, 9.0], str(i))], [([0.0, 0.0, 9.0, 9.0], str(i))])) for i in range(999)]
    matches = class_matches(scenes)
    assert len(matches) == 999 and sum(one.true.nbytes + one.scene.nbytes for one in matches) == 999 * 2 * 8
    assert resampled(matches, np.ones((1, 999)))[0].tolist() == [1.0, 1.0]


def test_resampled_precision_is_that_of_the_repeated_pictures() -> None:
    """Pictures drawn 0, 1 or 2 times: as pycocotools on the pictures that were drawn, where none was drawn twice."""
    rng = np.random.default_rng(3)
    rows = [random_scene(rng) for _ in range(30)]
    matches = class_matches([Scene.of_row(r) for r in rows])
    for _ in range(20):
        drawn = rng.random(30) < 0.6
        found = resampled(matches, drawn[None].astype(float))[0]
        assert found == pytest.approx(pycoco([r for r, kept in zip(rows, drawn, strict=True) if kept]), abs=1e-9)


A, B, FAR = [0.0, 0.0, 10.0, 10.0], [20.0, 0.0, 30.0, 10.0], [80.0, 80.0, 90.0, 90.0]


def test_greedy_precision_and_recall_by_hand() -> None:
    rows = [
        row([(A, "cat"), (A, "cat"), (B, "dog"), (FAR, "cow")], [(A, "cat"), (B, "cat")]),  # 1 of 4, 1 of 2
        row([(B, "dog")], [(B, "dog"), (A, "dog"), (FAR, "dog")]),  # 1 of 1, 1 of 3
        row([], []),
    ]
    found = detection.figures(rows)
    assert found["greedy_precision"] == pytest.approx(2 / 5)
    assert found["greedy_recall"] == pytest.approx(2 / 5)


def test_an_overlap_of_one_half_is_enough_for_a_greedy_match_but_not_for_suppression() -> None:
    half = [0.0, 0.0, 5.0, 10.0]
    assert detection.figures([row([(half, "a")], [(A, "a")])])["greedy_recall"] == 1
    kept = ovdeval.suppressed(Scene.of_row(row([(half, "a"), (half, "b")], [(A, "a")])))
    assert kept.labels == ("a", "b")


def test_the_best_true_box_is_taken_first() -> None:
    """The first prediction overlaps both; it takes the better one, and the second the other."""
    near, nearer = [0.0, 0.0, 10.0, 12.0], [0.0, 0.0, 10.0, 11.0]
    found = hits(np.array([A, near]), np.array([near, nearer]), np.array([0.5]))
    assert found.tolist() == [[True], [True]]
    found = hits(np.array([A, near]), np.array([near, nearer]), np.array([0.95]))
    assert found.tolist() == [[False], [True]]
    assert hits(np.zeros((2, 4)), np.zeros((1, 4)), np.array([0.5])).tolist() == [[False], [False]]


def test_nms_ap_does_not_reward_both_labels() -> None:
    """Two pictures of a hard pair, both labels answered at each object: after suppression only the first one stays."""
    both = [(A, "lit"), (A, "unlit")]
    rows = [row(both, [(A, "lit")]), row(both, [(A, "unlit")])]
    found = detection.figures(rows)
    # Plain, per class: lit is right, then wrong: 1. unlit is wrong, then right: precision 1/2.
    assert found["map"] == pytest.approx((1 + 0.5) / 2)
    # lit alone stays in both pictures: right, then wrong: 1; unlit: nothing left: 0.
    assert found["nms_ap"] == pytest.approx(0.5)
    honest = [row([(A, "lit")], [(A, "lit")]), row([(A, "unlit")], [(A, "unlit")])]
    assert detection.figures(honest)["nms_ap"] == pytest.approx(1)


def test_suppression_by_hand() -> None:
    near = [1.0, 0.0, 11.0, 10.0]  # 9 / 11 with A
    scene = Scene.of_row(row([(FAR, "x"), (near, "y"), (A, "x"), (FAR, "y"), (B, "x")], [(A, "x"), (B, "y")]))
    kept = ovdeval.suppressed(scene)
    # FAR overlaps with no truth: both false alarms stay. `near` comes before A on the same object.
    assert kept.labels == ("x", "y", "y", "x")
    assert kept.boxes[1].tolist() == near
    # One prediction that loses one object and wins another stays.
    wide, tall = [0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 14.0]
    both = Scene.of_row(row([(wide, "x"), (tall, "y")], [(wide, "x"), ([0.0, 0.0, 10.0, 28.0], "y")]))
    assert ovdeval.suppressed(both).labels == ("x",)  # tall has exactly half of the second, which is not enough
    both = Scene.of_row(row([(wide, "x"), (tall, "y")], [(wide, "x"), ([0.0, 0.0, 10.0, 27.0], "y")]))
    assert ovdeval.suppressed(both).labels == ("x", "y")


OVERALL = {
    "celebrity": 0.1,
    "logo": 0.2,
    "landmark": 0.6,
    "color": 0.2,
    "material": 0.4,
    "position": 0.5,
    "relationship": 0.7,
    "negation": 0.1,
}


def test_overall_by_hand() -> None:
    assert ovdeval.overall(OVERALL) == pytest.approx((0.3 + 0.3 + 0.5 + 0.7 + 0.1) / 5)


def test_overall_of_rows() -> None:
    """Right in three sub-tasks of one aspect and in one of two of another: (1 + 1/2 + 0 + 0 + 0) / 5."""
    right = {"celebrity", "logo", "landmark", "color"}
    rows = [row([(A, "a" if name in right else "b")], [(A, "a")], name) for name in OVERALL for _ in range(4)]
    assert detection.figures(rows)["nms_ap_overall"] == pytest.approx(1.5 / 5)
    assert "nms_ap_overall" not in detection.figures(rows[:-4])
    found = detection.estimates(rows, 0)["nms_ap_overall"]
    assert (found.low, found.high) == pytest.approx((0.3, 0.3))  # each sub-task is all right or all wrong


def test_estimates_agree_with_figures_and_bracket_them() -> None:
    rng = np.random.default_rng(5)
    rows = [random_scene(rng) for _ in range(40)]
    figures, found = detection.figures(rows), detection.estimates(rows, 1)
    assert {name: e.value for name, e in found.items()} == figures
    for e in found.values():
        assert e.low < e.value < e.high and e.high - e.low < 0.3
    assert detection.estimates(rows, 1) == found
    assert detection.estimates(rows, 2) != found


def test_without_any_object() -> None:
    found = detection.estimates([row([], []), row([(A, "a")], [])], 0)
    assert math.isnan(found["map"].value) and math.isnan(found["map"].low)
    assert found["greedy_precision"].value == 0 and math.isnan(found["greedy_recall"].value)


def test_wide_vocabularies_are_linear_in_the_boxes() -> None:
    """2,000 classes on 2,000 pictures: four million pairs, of which two thousand have a box."""
    rows = [row([(A, f"c{i}")], [(A, f"c{i}")]) for i in range(2000)]
    scenes = [Scene.of_row(r) for r in rows]
    assert np.mean(list(average_precisions(scenes).values())) == pytest.approx(1)


def test_intervals_cover_the_mean_of_a_known_distribution() -> None:
    """400 data sets of 60 draws from Bernoulli(.3): a 95 % interval holds .3 in 95 % of them, within sampling error."""
    rng = np.random.default_rng(7)
    inside = 0
    for seed in range(400):
        (found,) = bootstrap.means((rng.random((60, 1)) < 0.3).astype(float), seed)
        inside += found.low <= 0.3 <= found.high
    assert 0.91 <= inside / 400 <= 0.975


def test_the_interval_of_a_mean_is_that_of_theory() -> None:
    values = np.random.default_rng(8).normal(2.0, 3.0, (2000, 1))
    (found,) = bootstrap.means(values, 0)
    error = values.std(ddof=1) / math.sqrt(2000)
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)


def test_missing_values_are_left_out_of_a_mean() -> None:
    """The mean absolute error of the answers that hold a number: |3 - 5| and |4 - 4|."""
    found = bootstrap.means(np.array([[2.0, 1.0], [np.nan, 0.0], [0.0, 1.0]]), 0)
    assert found[0].value == 1.0 and found[1].value == pytest.approx(2 / 3)
    (nothing,) = bootstrap.means(np.full((3, 1), np.nan), 0)
    assert math.isnan(nothing.value) and math.isnan(nothing.low)


def test_weights_draw_as_many_as_there_are() -> None:
    drawn = np.concatenate(list(bootstrap.weights(50_000, 100, 0)))  # more than one chunk
    assert drawn.shape == (100, 50_000) and (drawn.sum(1) == 50_000).all()
    assert drawn.var() == pytest.approx(1.0, abs=0.01)
