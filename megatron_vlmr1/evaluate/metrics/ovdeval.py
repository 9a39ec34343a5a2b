"""OVDEval's NMS-AP (arXiv 2308.13177): boxes that name one object twice, by its class and by a near miss, don't pay.

Plain AP rewards a model that answers every object with both labels of a hard pair, since classes are scored apart.
Before AP, predictions of any class on one true object compete, and the best-scored one stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

import numpy as np

from megatron_vlmr1.evaluate.metrics.scenes import Scene, overlaps

GROUPS = (
    ("celebrity", "logo", "landmark"),
    ("color", "material"),
    ("position",),
    ("relationship",),
    ("negation",),
)
"""Sub-tasks by aspect; VLM-R1's overall is the mean over aspects (arXiv 2504.07615)."""

SUBTASKS = frozenset(name for group in GROUPS for name in group)


def suppressed(scene: Scene, iou: float = 0.5) -> Scene:
    """Return the scene less the predictions that lose: of those over one true box, all but the first.

    All scores are 1, so the best-scored is the first. As in the benchmark, predictions compete for true boxes of any
    class, not with each other: one that wins another true box stays, and those over none are false alarms.
    """
    rivals = overlaps(scene.boxes, scene.true_boxes) > iou  # [P, G]
    winner = rivals & (np.cumsum(rivals, 0) == 1)
    kept = winner.any(1) | ~rivals.any(1)
    labels = tuple(label for label, stays in zip(scene.labels, kept, strict=True) if stays)
    return Scene(scene.boxes[kept], labels, scene.true_boxes, scene.true_labels)


def overall(by_subtask: Mapping[str, float]) -> float:
    """Return the mean over aspects of the mean over an aspect's sub-tasks.

    Raises:
        KeyError: a sub-task is missing.
    """
    return fmean(fmean(by_subtask[name] for name in group) for group in GROUPS)
