"""Numbers of a run: ``metrics.jsonl``, TensorBoard, Weights & Biases, Prometheus."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_vlmr1.telemetry.events import ScalarEvents
from megatron_vlmr1.telemetry.files import json_line, write_atomic
from megatron_vlmr1.telemetry.lines import LineFile
from megatron_vlmr1.telemetry.prometheus import PrometheusEndpoint
from megatron_vlmr1.telemetry.wandb_sink import WandbSink

log = logging.getLogger(__name__)

MetricRows = list[tuple[int, dict[str, float]]]


class MetricsWriter:
    """Writes a run's metrics; only one rank should have one.

    No failure to write ends or holds up training: lines of ``metrics.jsonl`` wait for a disk that is full, TensorBoard
    and Weights & Biases lose points, and each says so once. ``telemetry/unwritten_lines`` counts the lines that were
    not in the file when a step was written, ``telemetry/lost_points`` the steps that the others did not get.
    """

    def __init__(
        self, run_dir: str | Path, wandb: WandbSink | None = None, prometheus: PrometheusEndpoint | None = None
    ) -> None:
        self._run_dir = Path(run_dir)
        self._lines = LineFile(self._run_dir / "metrics.jsonl")
        self._wandb, self._prometheus = wandb, prometheus
        self._events: ScalarEvents | None = None
        self._lost = 0
        self._failing = self._given_up = False  # TensorBoard

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line ``{"step", "unix_s", name: value, …}`` and one TensorBoard point per metric.

        Args:
            step: the step that was just done, counted from 0.
            metrics: name to number; NaN and infinities are kept as strings in the file.
        """
        values = {name: float(value) for name, value in metrics.items()}
        values["telemetry/unwritten_lines"] = float(self._lines.unwritten)
        values["telemetry/lost_points"] = float(self._lost + (self._wandb.dropped if self._wandb else 0))
        self._lines.append(json_line({"step": step, "unix_s": round(time.time(), 3)} | values))
        if not self._given_up:
            self._write_events(step, values)
        if self._wandb is not None:
            self._wandb.write(step, values)
        if self._prometheus is not None:
            self._prometheus.write(step, values)

    def truncate_after(self, step: int) -> None:
        """Drop what was written of `step` and later, and torn lines: for a run that resumes at `step`.

        Raises:
            OSError: the file cannot be read or rewritten. Resuming would then double steps, so this one is raised.
        """
        self._events = None
        path = self._lines.path
        if not path.is_file():
            return
        lines = path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if (row := _parse(line)) is not None and row[0] < step]
        if kept != lines:
            write_atomic(path, b"".join(line if line.endswith(b"\n") else line + b"\n" for line in kept))

    def close(self) -> None:
        """Write what still waits, stop serving, and end the W&B run."""
        self._lines.flush()
        if self._prometheus is not None:
            self._prometheus.close()
        if self._wandb is not None:
            self._wandb.close()

    def _write_events(self, step: int, values: Mapping[str, float]) -> None:
        try:
            if self._events is None:
                self._events = ScalarEvents(self._run_dir / "tensorboard", first_step=step)
            self._events.write(step, values)
        except Exception as error:  # a plotting library, whatever it raises, is no reason to lose a training run
            self._lost += 1
            if not self._failing:
                log.error("%s/tensorboard is not written, and the run goes on without: %s", self._run_dir, error)
            self._failing, self._given_up = True, not isinstance(error, OSError)
            return
        if self._failing:
            log.warning("%s/tensorboard is written again; %d steps were lost", self._run_dir, self._lost)
        self._failing = False


def read_metrics(run_dir: str | Path) -> MetricRows:
    """Return (step, {name: value}) in the order of steps; lines of the same step are merged, later ones win.

    Torn lines and values that are no numbers are left out; a missing file gives an empty list.
    """
    path = Path(run_dir) / "metrics.jsonl"
    steps: dict[int, dict[str, float]] = {}
    if path.is_file():
        for line in path.read_bytes().splitlines():
            row = _parse(line)
            if row is not None:
                steps.setdefault(row[0], {}).update(_numbers(row[1]))
    return sorted(steps.items())


def _parse(line: bytes) -> tuple[int, dict[str, Any]] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        return None
    return row.pop("step"), row


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for name, value in row.items():
        try:
            numbers[name] = float(value)
        except (TypeError, ValueError, OverflowError):
            continue
    return numbers
