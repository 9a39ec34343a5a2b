"""Numbers as people read them."""

from __future__ import annotations

import math
from typing import Any

_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k"))


def short(value: float, digits: int = 3) -> str:
    """Return about so many significant digits: 0.705, 26.6, 1,234, 925M, 4.5e-4."""
    size = abs(value)
    for unit, letter in _UNITS:
        if size >= unit:
            return f"{value / (1e3 if letter == 'k' else unit):.{digits}g}{letter}"
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 10 or value == 0:
        return f"{value:.{digits}g}"
    if size >= 0.01:
        return f"{value:.{digits}f}"
    return f"{value:.{digits - 1}g}".replace("e-0", "e-") if size < 1e-3 else f"{value:.{digits + 1}f}"


def tick(value: float) -> str:
    """Return an axis label: exact, but for large numbers, which take a unit letter."""
    return short(value) if abs(value) >= 1e4 else f"{value:.6g}".replace("e-0", "e-")


def number(value: Any) -> float | None:
    """Return a finite float, or None for anything else."""
    try:
        result = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return result if math.isfinite(result) else None
