"""The report of a scaling study: csv, a page in markdown, and its plots."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from megatron_vlmr1.plan.study import DONE
from megatron_vlmr1.report import scaling_plots
from megatron_vlmr1.report.numbers import short
from megatron_vlmr1.report.scaling_rows import KINDS, Row
from megatron_vlmr1.telemetry.files import write_atomic


def write(out: Path, found: Sequence[Row]) -> Path:
    """Write ``scaling.csv``, ``scaling.md`` and the plots beside it; return the page's path.

    Raises:
        OSError: the directory cannot be written.
    """
    write_atomic(out / "scaling.csv", csv_table(found).encode())
    plots = scaling_plots.draw(out, found)
    failed = "".join(f"- {row.name}, {row.state}: {row.reason or 'no reason told'}\n" for row in _not_done(found))
    parts = [f"# Scaling study {out.name}\n", markdown_table(found)]
    if failed:
        parts.append(f"## Not done\n\n{failed}")
    parts += [f"## {title}\n\n![{title}]({file})\n" for title, file in plots]
    page = out / "scaling.md"
    write_atomic(page, "\n".join(parts).encode())
    return page


def _not_done(found: Sequence[Row]) -> list[Row]:
    return [row for row in found if row.state != DONE]


def csv_table(found: Sequence[Row]) -> str:
    """Return all numbers of all rows as csv; what was not measured is empty."""
    documents = [row.document() for row in found]
    columns = list(dict.fromkeys(name for document in documents for name in document))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(documents)
    return text.getvalue()


def markdown_table(found: Sequence[Row]) -> str:
    """Return the main numbers of all rows as a table."""
    kinds = [kind for kind in KINDS if any(kind in row.scaling for row in found)]
    head = [
        "cell",
        "ranks",
        "state",
        "step s",
        "planned s",
        "tokens/s/GPU",
        "MFU",
        "memory",
        *(f"{kind} %" for kind in kinds),
    ]
    lines = [_line(head), _line(["---"] * len(head))]
    for row in found:
        efficiencies = [_percent(row.efficiency.get(kind)) for kind in kinds]
        numbers = [
            _number(row.step_s),
            _number(row.predicted_step_s),
            _number(row.tokens_per_s_per_gpu),
            _percent(row.mfu),
            _bytes(row.memory_bytes),
        ]
        lines.append(_line([row.name, str(row.ranks), row.state, *numbers, *efficiencies]))
    return "\n".join(lines) + "\n"


def _line(values: Sequence[str]) -> str:
    return "| " + " | ".join(values) + " |"


def _number(value: float | None) -> str:
    return "" if value is None else short(value)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _bytes(value: float | None) -> str:
    return "" if value is None else f"{value / 1e9:.2f} GB"
