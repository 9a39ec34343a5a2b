"""Bytes by part, and the dearest of several moments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

Parts = dict[str, int]  # part -> bytes


def joined(*parts: Mapping[str, int]) -> Parts:
    """Return the sum, part by part."""
    out: Parts = {}
    for each in parts:
        for name, count in each.items():
            out[name] = out.get(name, 0) + count
    return out


def total(parts: Mapping[str, int]) -> int:
    """Return the sum of all parts."""
    return sum(parts.values())


def dearest(moments: Iterable[Parts]) -> Parts:
    """Return the moment with the most bytes; nothing where there is none."""
    return max(moments, key=total, default={})


def present(parts: Mapping[str, int]) -> Parts:
    """Return the parts that take anything."""
    return {name: count for name, count in parts.items() if count}
