"""Boxes of one picture as arrays, their overlaps, and who takes whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""COCO's IoU thresholds."""

_JUST_BELOW_ONE = 1 - 1e-10  # COCO's: an IoU of 1 always matches
_NOWHERE = (0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Scene:
    """One picture: what was predicted, in its order and all with score 1, and what is there."""

    boxes: Floats  # [P, 4]: x1, y1, x2, y2 in pixels
    labels: tuple[str, ...]
    true_boxes: Floats  # [G, 4]
    true_labels: tuple[str, ...]

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> Scene:
        """Read a row of ``evaluations/LABEL_SPLIT.jsonl`` of a task that has `objects`.

        A prediction that is reversed, or no box at all, becomes one without area, which is a false alarm; COCO would
        not count a reversed one.
        """
        sides = [[(item["bbox_2d"] or _NOWHERE, item["label"]) for item in row[side]] for side in ("predicted", "true")]
        arrays = [np.array([box for box, _ in side], np.float64).reshape(-1, 4) for side in sides]
        np.maximum(arrays[0][:, 2:], arrays[0][:, :2], out=arrays[0][:, 2:])
        labels = [tuple(label for _, label in side) for side in sides]
        return cls(arrays[0], labels[0], arrays[1], labels[1])

    def of_class(self, label: str) -> tuple[Floats, Floats]:
        """Return the predicted and the true boxes of one class."""
        return self.boxes[self.where(label)], self.true_boxes[[name == label for name in self.true_labels]]

    def where(self, label: str) -> Bools:
        """Return which predictions are of one class, [P]."""
        return np.array([name == label for name in self.labels], bool)


def overlaps(boxes: Floats, others: Floats) -> Floats:
    """Return intersection over union of each pair, [P, G]; 0 where the union is empty or no finite number."""
    a, b = boxes[:, None], others[None]
    with np.errstate(over="ignore", invalid="ignore"):
        sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
        shared = np.clip(sides, 0, None).prod(-1)
        union = areas(a) + areas(b) - shared
        return np.divide(shared, union, out=np.zeros_like(shared), where=(union > 0) & np.isfinite(union))


def areas(boxes: Floats) -> Floats:
    """Return the areas of boxes [..., 4]; a reversed box has none."""
    return np.clip(boxes[..., 2:] - boxes[..., :2], 0, None).prod(-1)


def hits(boxes: Floats, true_boxes: Floats, thresholds: Floats = THRESHOLDS) -> Bools:
    """Return which predictions take a true box at each threshold, [P, T].

    As COCO's evaluation: in their order each takes the free true box that it overlaps most, if that is enough; of
    equals the last.
    """
    iou = overlaps(boxes, true_boxes)
    taken = np.zeros((len(thresholds), len(true_boxes)), bool)
    found = np.zeros((len(boxes), len(thresholds)), bool)
    if not len(true_boxes):
        return found
    enough = np.minimum(thresholds, _JUST_BELOW_ONE)
    steps = np.arange(len(thresholds))
    for i in np.flatnonzero(iou.max(1, initial=0.0) >= enough.min()):
        free = np.where(taken, -1.0, iou[i])
        best = len(true_boxes) - 1 - free[:, ::-1].argmax(1)
        found[i] = free[steps, best] >= enough
        taken[steps[found[i]], best[found[i]]] = True
    return found


def classes(scenes: Sequence[Scene]) -> list[str]:
    """Return the classes of all true boxes, in order."""
    return sorted({label for scene in scenes for label in scene.true_labels})
