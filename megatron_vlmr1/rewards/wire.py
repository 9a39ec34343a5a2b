"""msgpack as it is spoken between trainer, reward service and reward processes. Nothing is ever unpickled."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgpack  # type: ignore[import-untyped]

MAX_ITEM_BYTES = 8 << 20
"""Largest item on the wire; a client answers a larger one with the failure `too_long` itself."""

MAX_RESULT_BYTES = 64 << 10
_MAX_REASON = 300


@dataclass(frozen=True)
class Result:
    """What a reward process found: the value of each part, or why there is none."""

    parts: Mapping[str, float] = field(default_factory=dict)
    failure: str | None = None

    def to_wire(self) -> bytes:
        """Return the bytes that `parse_result` reads."""
        failure = None if self.failure is None else " ".join(self.failure.split())[:_MAX_REASON]
        return pack({"parts": dict(self.parts), "failure": failure})


def pack(value: Any) -> bytes:
    """Return `value` (None, bool, int, float, str, bytes, list, dict) as msgpack; lone surrogates survive."""
    data = msgpack.packb(value, unicode_errors="surrogatepass")
    assert isinstance(data, bytes)
    return data


def unpack(data: bytes) -> Any:
    """Return the decoded value.

    Raises:
        ValueError: not exactly one msgpack value, or a map key that is no text.
    """
    return msgpack.unpackb(data, unicode_errors="surrogatepass", strict_map_key=True)


def parse_results(data: object, count: int) -> list[Result]:
    """Validate the list of `count` packed results that a reward process sent back."""
    try:
        raw = unpack(data) if isinstance(data, bytes) else None
    except ValueError:
        raw = None
    if not isinstance(raw, list) or len(raw) != count:
        raw = [None] * count
    return [parse_result(result) for result in raw]


def parse_result(data: object) -> Result:
    """Validate what came out of a reward process; anything but finite parts or a reason is itself a failure."""
    if not isinstance(data, bytes) or len(data) > MAX_RESULT_BYTES:
        return Result(failure="invalid result: not a short msgpack message")
    try:
        raw = unpack(data)
    except ValueError:
        return Result(failure="invalid result: not msgpack")
    if not isinstance(raw, dict) or raw.keys() != {"parts", "failure"} or not isinstance(raw["parts"], dict):
        return Result(failure="invalid result: not parts and failure")
    if raw["failure"] is not None:
        return Result(failure=str(raw["failure"])[:_MAX_REASON] or "invalid result: empty reason")
    for name, value in raw["parts"].items():
        if not isinstance(name, str) or type(value) is not float or not math.isfinite(value):
            return Result(failure=f"invalid result: {str(name)[:40]} is not a finite number")
    return Result(parts=raw["parts"])
