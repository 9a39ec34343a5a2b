"""What this program is asked to make of a Hopper GPU, beside what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Part, beginning of the case's name, figure, and how much of it; the best of several cases counts.
ASKED = (
    ("train", "3b bf16", "mfu", 0.5),
    ("train", "7b bf16", "mfu", 0.5),
    ("train", "3b fp8", "times_bf16", 1.3),
    ("train", "7b fp8", "times_bf16", 1.3),
    ("decode", "3b x 64, graphs", "of_copy", 0.6),
    ("decode", "7b x 64, graphs", "of_copy", 0.6),
    ("decode", "3b x 8, graphs", "times_eager", 3.0),
    ("decode", "7b x 8, graphs", "times_eager", 3.0),
)


def beside(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what is asked, a row each: part, case, figure, asked, and measured or None."""
    out = []
    for part, case, figure, asked in ASKED:
        found = [
            row["figures"][figure]
            for row in rows
            if row["part"] == part and row["case"].startswith(case) and figure in row.get("figures", {})
        ]
        measured = max(found, default=None)
        out.append({"part": part, "case": case, "figure": figure, "asked": asked, "measured": measured})
    return out


def in_words(row: Mapping[str, Any]) -> str:
    """Return one of them as a line."""
    measured = row["measured"]
    verdict = "not measured" if measured is None else f"{measured:.3g}: {'yes' if measured >= row['asked'] else 'no'}"
    return f"{row['part']}, {row['case']}: {row['figure']} of at least {row['asked']:g}? {verdict}"
