"""The default mean average precision over the classes of one image."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megatron_vlmr1.rewards.average_precision import THRESHOLDS, Rect, average_precision, rect
from megatron_vlmr1.rewards.detections import Detection

AP50 = THRESHOLDS[:1]


def mean_average_precision(
    predicted: Iterable[Detection],
    truth: Iterable[Detection],
    thresholds: Sequence[float] = THRESHOLDS,
    surplus_costs: bool = True,
) -> float:
    """Return the mean over the classes of truth and prediction, in [0, 1]; a class that the truth lacks gives 0.

    Args:
        predicted: boxes in pixels of the original image.
        truth: at least one, all of them with a label and a box.
        thresholds: least overlaps of a match.
        surplus_costs: whether a class's value is multiplied by truths / predictions where it has more predictions.
    """
    found, classes = _by_label(predicted), _by_label(truth)
    total = 0.0
    for label, boxes in classes.items():
        detections = found.get(label, [])
        value = average_precision(detections, [box for box in boxes if box is not None], thresholds)
        assert value is not None, "a truth without an area"
        total += value * (min(1.0, len(boxes) / len(detections)) if surplus_costs and detections else 1.0)
    return total / len(classes.keys() | found.keys())


def _by_label(detections: Iterable[Detection]) -> dict[str, list[Rect | None]]:
    classes: dict[str, list[Rect | None]] = {}
    for label, box in detections:
        classes.setdefault(label, []).append(None if box is None else rect(*box))
    return classes
