"""Numbers of a run: ``metrics.jsonl``, TensorBoard, and a line on the console."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_vlmr1.telemetry.events import ScalarEvents
from megatron_vlmr1.telemetry.files import json_line, write_atomic

log = logging.getLogger(__name__)

MetricRows = list[tuple[int, dict[str, float]]]


class MetricsWriter:
    """Writes a run's metrics; only one rank should have one.

    No failure to write ends training: each sink warns once. ``metrics.jsonl`` is tried again at every step,
    TensorBoard is dropped.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self._run_dir = Path(run_dir)
        self._path = self._run_dir / "metrics.jsonl"
        self._events: ScalarEvents | None = None
        self._warned: set[str] = set()
        self._torn = False
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            self._torn = _ends_torn(self._path)
        except OSError as error:
            self._warn("metrics.jsonl", error)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line ``{"step", "unix_s", name: value, …}`` and one TensorBoard point per metric.

        Args:
            step: the step that was just done, counted from 0.
            metrics: name to number; NaN and infinities are kept as strings in the file.
        """
        values = {name: float(value) for name, value in metrics.items()}
        self._append(json_line({"step": step, "unix_s": round(time.time(), 3)} | values))
        self._write_events(step, values)

    def truncate_after(self, step: int) -> None:
        """Drop what was written of `step` and later, and torn lines: for a run that resumes at `step`.

        Raises:
            OSError: the file cannot be read or rewritten. Resuming would then double steps, so this one is raised.
        """
        self._events = None
        if not self._path.is_file():
            return
        lines = self._path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if (row := _parse(line)) is not None and row[0] < step]
        write_atomic(self._path, b"".join(line if line.endswith(b"\n") else line + b"\n" for line in kept))
        self._torn = False

    def close(self) -> None:
        """Close the TensorBoard file."""
        if self._events is not None:
            self._events.close()
            self._events = None

    def _append(self, line: bytes) -> None:
        try:
            # Reopened each time: a file that was rotated or a disk that came back is found again.
            with self._path.open("ab", buffering=0) as file:
                data = b"\n" + line if self._torn else line
                written = file.write(data)
                self._torn = written != len(data)
                if self._torn:
                    raise OSError(f"{written} of {len(data)} bytes written")
        except OSError as error:
            self._warn("metrics.jsonl", error)

    def _write_events(self, step: int, values: Mapping[str, float]) -> None:
        if "tensorboard" in self._warned:
            return
        try:
            if self._events is None:
                self._events = ScalarEvents(self._run_dir / "tensorboard", first_step=step)
            self._events.write(step, values)
        except Exception as error:  # a plotting library, whatever it raises, is no reason to lose a training run
            self._events = None
            self._warn("tensorboard", error)

    def _warn(self, sink: str, error: Exception) -> None:
        if sink not in self._warned:
            self._warned.add(sink)
            log.warning("%s of %s is not written: %s", sink, self._run_dir, error)


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


def _ends_torn(path: Path) -> bool:
    """Whether the file's last line has no newline: a writer was killed in the middle of it."""
    if not path.is_file() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


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
