"""COCO's average precision over the pictures of a split: by faster-coco-eval, and of resamples from the matches.

A class without a true box in the split has no AP, as in COCO: predictions of it cost nothing here. Greedy precision and
OVDEval's NMS-AP, beside it, see them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_vlmr1.evaluate.metrics.bootstrap import ratio
from megatron_vlmr1.evaluate.metrics.scenes import THRESHOLDS, Bools, Floats, Scene, classes, hits

MAX_DETECTIONS = 100
"""COCO's, per picture and class."""

_RECALLS = np.linspace(0.0, 1.0, 101)
_CHUNK = 1 << 22


def average_precisions(scenes: Sequence[Scene]) -> dict[str, Floats]:
    """Return each class's AP at each of COCO's IoU thresholds, [10]; classes without a true box are left out.

    One class at a time, over the pictures that have it: faster-coco-eval holds every pair of a picture and a class, of
    which open vocabularies have tens of millions.
    """
    pictures: dict[str, set[int]] = {label: set() for label in classes(scenes)}
    for number, scene in enumerate(scenes):
        for label in {*scene.labels, *scene.true_labels} & pictures.keys():
            pictures[label].add(number)
    return {label: _of_class(label, [scenes[i] for i in sorted(numbers)]) for label, numbers in pictures.items()}


def _of_class(label: str, scenes: Sequence[Scene]) -> Floats:
    from faster_coco_eval import COCO, COCOeval_faster

    sides = [scene.of_class(label) for scene in scenes]
    found, truth = (
        [
            {"id": 0, "image_id": i, "category_id": 1, "bbox": xywh, "area": xywh[2] * xywh[3], "iscrowd": 0}
            for i, boxes in enumerate(side)
            for xywh in np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()
        ]
        for side in zip(*sides, strict=True)
    )
    if not found:
        return np.zeros(len(THRESHOLDS))
    truth = [{**row, "id": i} for i, row in enumerate(truth, 1)]
    coco = COCO({"images": [{"id": i} for i in range(len(scenes))], "categories": [{"id": 1}], "annotations": truth})
    run = COCOeval_faster(coco, coco.loadRes([{**row, "score": 1.0} for row in found]), "bbox")
    run.params.areaRng, run.params.areaRngLbl = [run.params.areaRng[0]], ["all"]
    run.params.maxDets = [MAX_DETECTIONS]
    run.evaluate()
    run.accumulate()
    precision: Floats = run.eval["precision"][:, :, 0, 0, 0]
    return precision.mean(1)


@dataclass(frozen=True)
class ClassMatches:
    """One class over a split."""

    scene: npt.NDArray[np.int64]  # [D] of each prediction
    hits: Bools  # [D, T]
    true: npt.NDArray[np.int64]  # [G] scene of each true box


def class_matches(scenes: Sequence[Scene]) -> list[ClassMatches]:
    """Match the predictions of each class that is in the truth; resampling pictures does not change who takes whom."""
    found: dict[str, tuple[list[int], list[Bools], list[int]]] = {label: ([], [], []) for label in classes(scenes)}
    for number, scene in enumerate(scenes):
        for label in {*scene.labels, *scene.true_labels} & found.keys():
            boxes, true_boxes = scene.of_class(label)
            numbers, matched, true = found[label]
            kept = hits(boxes, true_boxes)[:MAX_DETECTIONS]
            numbers += [number] * len(kept)
            matched.append(kept)
            true += [number] * len(true_boxes)
    return [
        ClassMatches(np.array(numbers, np.int64), np.concatenate(matched), np.array(true, np.int64))
        for numbers, matched, true in found.values()
    ]


def resampled(matches: Sequence[ClassMatches], weights: Floats) -> Floats:
    """Return mAP and AP50 of resamples, [r, 2], from how often each drew each picture, [r, scenes].

    A picture that was drawn several times stands in one place of the ranking, so that a resample's value is that of
    its pictures in the split's order. A class counts in the resamples that drew a true box of it.
    """
    out = np.zeros((len(weights), 2))
    for start, stop in _chunks(matches, len(weights)):
        total, count = np.zeros((2, stop - start, len(THRESHOLDS)))
        for one in matches:  # not all at once: open vocabularies have as many classes as pictures
            table = _weighted(one, weights[start:stop])
            count += np.isfinite(table)
            total += np.nan_to_num(table)
        mean = ratio(total, count)
        out[start:stop] = np.stack([mean.mean(1), mean[:, 0]], 1)
    return out


def _chunks(matches: Sequence[ClassMatches], resamples: int) -> list[tuple[int, int]]:
    widest = max(one.hits.size for one in matches)
    most = max(1, _CHUNK // max(1, widest))
    return [(start, min(start + most, resamples)) for start in range(0, resamples, most)]


def _weighted(one: ClassMatches, weights: Floats) -> Floats:
    """AP of one class at each threshold, [r, T]; NaN where a resample has no true box of it."""
    positives = weights[:, one.true].sum(1)  # [r]
    empty = np.where(positives > 0, 0.0, np.nan)
    if not len(one.scene):
        return np.repeat(empty[:, None], len(THRESHOLDS), 1)
    drawn = weights[:, one.scene]  # [r, D]
    right = np.cumsum(drawn[:, :, None] * one.hits, 1)  # [r, D, T]
    precision = right / np.maximum(np.cumsum(drawn, 1), 1e-300)[:, :, None]
    envelope = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
    recall = right / np.maximum(positives, 1e-300)[:, None, None]
    # Each prediction answers for the recalls that it is the first to reach.
    reached = np.searchsorted(_RECALLS, recall, side="right")
    gained = np.diff(reached, axis=1, prepend=0)
    return (envelope * gained).sum(1) / len(_RECALLS) + empty[:, None]
