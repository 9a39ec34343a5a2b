"""Text files that are whole or absent, and JSON that every parser reads."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` beside `path`, then rename: a reader sees the old file or the whole new one.

    Raises:
        OSError: the disk is full or the directory cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_or_warn(path: Path, data: bytes) -> bool:
    """Do as `write_atomic` does, for a file that nobody has to have: return whether it is there, after a warning."""
    try:
        write_atomic(path, data)
    except OSError as error:
        log.warning("%s is not written: %s", path, error)
        return False
    return True


def readable_text(path: Path) -> str:
    """Return a file's text, and nothing where it cannot be read: for whoever tells what can be known."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def json_line(row: Mapping[str, Any]) -> bytes:
    """Return `row` as one line of strict JSON, newline included.

    Numbers that JSON lacks become the strings "NaN", "Infinity" and "-Infinity", which ``float()`` reads back.
    Pure ASCII, so that model text with lone surrogates can be written.
    """
    return json.dumps(_strict(row), allow_nan=False, separators=(",", ":")).encode() + b"\n"


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    number = float(value)  # numpy and torch scalars too
    if math.isnan(number):
        return "NaN"
    if math.isinf(number):
        return "Infinity" if number > 0 else "-Infinity"
    return number
