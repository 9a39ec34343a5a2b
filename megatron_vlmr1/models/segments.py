"""Which queries of a packed row see which keys, and which of these pieces are computed together. No torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """Queries `start`..`stop`, which see the keys of `prefix` (if any) and their own; causal at the bottom right."""

    start: int
    stop: int
    prefix: tuple[int, int] | None = None


def alike(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Return segments that are padded to one shape, batch by batch; empty ones are left out."""
    batches: dict[tuple[int, int], list[Segment]] = defaultdict(list)
    for s in segments:
        if s.stop > s.start:
            keys = s.stop - s.start + (s.prefix[1] - s.prefix[0] if s.prefix else 0)
            batches[rung(s.stop - s.start), rung(keys)].append(s)
    return list(batches.values())


def rung(n: int) -> int:
    """Round up to the next of 1, 2, 3, 4, 6, 8, 12, 16, 24, ...: padding costs at most a half."""
    power = 1 << (n - 1).bit_length()
    return power * 3 // 4 if power >= 4 and n <= power * 3 // 4 else power
