"""What TensorBoard shows of a run."""

from __future__ import annotations

from pathlib import Path


def tensorboard_points(run: Path, tag: str) -> list[tuple[int, float]]:
    """Return a curve's points, read by TensorBoard itself."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run / "tensorboard"))
    accumulator.Reload()
    return [(point.step, round(point.value, 6)) for point in accumulator.Scalars(tag)]
