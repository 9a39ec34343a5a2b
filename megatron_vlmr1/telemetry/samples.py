"""Completions of a step, for people to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_vlmr1.telemetry.files import json_line, write_or_warn


def write_samples(run_dir: str | Path, step: int, rows: Sequence[Mapping[str, Any]]) -> Path | None:
    """Write ``samples/step_N.jsonl``, whole or not at all, one prompt per line.

    Args:
        run_dir: the run's directory.
        step: the step that was just done, counted from 0.
        rows: key, question, truth and completions: ``[{text, value, parts, failure, advantage, finish_reason}]``.

    Returns:
        The file, or None after a warning: a full disk does not end training.
    """
    path = Path(run_dir) / "samples" / f"step_{step}.jsonl"
    return path if write_or_warn(path, b"".join(json_line(row) for row in rows)) else None
