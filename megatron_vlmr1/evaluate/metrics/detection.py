"""Figures of a detection split: mAP, AP50, greedy precision and recall, and OVDEval's NMS-AP. All scores are 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_vlmr1.evaluate.metrics import bootstrap, ovdeval
from megatron_vlmr1.evaluate.metrics.average_precision import average_precisions, class_matches, resampled
from megatron_vlmr1.evaluate.metrics.bootstrap import Estimate
from megatron_vlmr1.evaluate.metrics.scenes import Floats, Scene, hits

RESAMPLES = 200
"""Of pictures, for AP: each resample sorts out every class and threshold anew."""

_HALF = np.array([0.5])


def figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the figures of a split's rows; NaN where the split does not define one.

    ``map`` and ``ap50`` are COCO's; ``greedy_precision`` and ``greedy_recall`` the shares of predicted and true boxes
    in a greedy match of the same class at IoU .5; ``nms_ap`` is mAP after OVDEval's suppression, and ``nms_ap_overall``
    OVDEval's mean over its sub-tasks, where the rows are of all of them.
    """
    scenes = [Scene.of_row(row) for row in rows]
    return _figures(rows, scenes, [ovdeval.suppressed(scene) for scene in scenes], _counts(scenes))


def _figures(
    rows: Sequence[Mapping[str, Any]], scenes: Sequence[Scene], suppressed: Sequence[Scene], counts: Floats
) -> dict[str, float]:
    found = _map(scenes) | {"nms_ap": _map(suppressed)["map"]}
    greedy = _greedy(counts.sum(0)[None])[0].tolist()
    found |= dict(zip(("greedy_precision", "greedy_recall"), greedy, strict=True))
    by_category: dict[str, list[Scene]] = {}
    for row, scene in zip(rows, suppressed, strict=True):
        by_category.setdefault(str(row.get("category")), []).append(scene)
    if ovdeval.SUBTASKS <= by_category.keys():
        found["nms_ap_overall"] = ovdeval.overall({name: _map(by_category[name])["map"] for name in ovdeval.SUBTASKS})
    return found


def estimates(rows: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Estimate]:
    """Return the figures of `figures` with intervals from resampled pictures."""
    scenes = [Scene.of_row(row) for row in rows]
    suppressed = [ovdeval.suppressed(scene) for scene in scenes]
    counts, n = _counts(scenes), len(scenes)
    found = _figures(rows, scenes, suppressed, counts)
    intervals = dict(
        zip(
            ("greedy_precision", "greedy_recall"),
            bootstrap.estimate(lambda w: _greedy(w @ counts), n, seed),
            strict=True,
        )
    )
    for names, some in ((("map", "ap50"), scenes), (("nms_ap",), suppressed)):
        if matches := class_matches(some):
            drawn = bootstrap.estimate(lambda w, m=matches: resampled(m, w), n, seed, RESAMPLES)  # type: ignore[misc]
            intervals |= dict(zip(names, drawn, strict=False))
    if "nms_ap_overall" in found:
        intervals["nms_ap_overall"] = _overall(rows, suppressed, seed)
    nothing = Estimate(float("nan"), float("nan"), float("nan"))
    bounds = {name: intervals.get(name, nothing) for name in found}
    return {name: Estimate(value, bounds[name].low, bounds[name].high) for name, value in found.items()}


def _map(scenes: Sequence[Scene]) -> dict[str, float]:
    tables = average_precisions(scenes)
    if not tables:
        return {"map": float("nan"), "ap50": float("nan")}
    table = np.stack(list(tables.values()))  # [classes, T]
    return {"map": float(table.mean()), "ap50": float(table[:, 0].mean())}


def _counts(scenes: Sequence[Scene]) -> Floats:
    """Hits, predictions and true boxes of each scene, [scenes, 3]."""
    rows = []
    for scene in scenes:
        shared = set(scene.labels) & set(scene.true_labels)
        right = sum(int(hits(*scene.of_class(label), _HALF).sum()) for label in shared)
        rows.append((right, len(scene.labels), len(scene.true_labels)))
    return np.array(rows, np.float64)


def _greedy(counts: Floats) -> Floats:
    """Precision and recall, [r, 2], of summed counts [r, 3]."""
    return np.stack([bootstrap.ratio(counts[:, 0], counts[:, 1]), bootstrap.ratio(counts[:, 0], counts[:, 2])], 1)


def _overall(rows: Sequence[Mapping[str, Any]], suppressed: Sequence[Scene], seed: int) -> Estimate:
    """OVDEval's mean over resamples of all pictures; a resample that lacks a sub-task's objects is left out."""
    places = {
        name: np.array([i for i, row in enumerate(rows) if str(row.get("category")) == name])
        for name in ovdeval.SUBTASKS
    }
    matches = {name: class_matches([suppressed[i] for i in where]) for name, where in places.items()}

    def statistic(weights: Floats) -> Floats:
        columns = {
            name: resampled(matches[name], weights[:, where])[:, 0] if matches[name] else np.full(len(weights), np.nan)
            for name, where in places.items()
        }
        overalls = [ovdeval.overall({k: float(v[i]) for k, v in columns.items()}) for i in range(len(weights))]
        return np.array(overalls)[:, None]

    return bootstrap.estimate(statistic, len(rows), seed, RESAMPLES)[0]
