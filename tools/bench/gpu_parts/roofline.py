"""The roofline of a run (S. Williams et al., CACM 52(4), 2009): what was measured below what the card reaches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from megatron_vlmr1.report.curves import GREY, PALETTE
from megatron_vlmr1.telemetry.files import write_atomic

_MARKS = "osD^vPX"
_NAMED = ("train", "decode")  # parts whose points bear their case's name
_LEFT_OF_THE_RIDGE = 100  # times, so much of the memory's slope is shown at the least

Point = tuple[float, float, str]  # FLOP per byte, FLOP/s, case


def points(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Point]]:
    """Return the rows that have FLOPs and bytes, by part."""
    out: dict[str, list[Point]] = {}
    for row in rows:
        if row.get("flops") and row.get("bytes"):
            point = row["flops"] / row["bytes"], row["flops"] / row["seconds"], row["case"]
            out.setdefault(row["part"], []).append(point)
    return out


def draw(document: Mapping[str, Any], path: Path) -> bool:
    """Write the picture as a PNG; return whether there was anything to draw."""
    from matplotlib.figure import Figure

    found, ceilings = points(document["rows"]), document["ceilings"]
    if not found or not {"bf16", "copy"} <= ceilings.keys():
        return False
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    every = [point for of_part in found.values() for point in of_part]
    ridge = ceilings["bf16"] / ceilings["copy"]
    low = min(ridge / _LEFT_OF_THE_RIDGE, min(x for x, _, _ in every) / 2)
    high = max(ridge, max(x for x, _, _ in every)) * 3
    _roofs(axes, ceilings, low, high)
    for i, (part, of_part) in enumerate(found.items()):
        colour = PALETTE[i % len(PALETTE)]
        xs, ys, names = zip(*of_part, strict=True)
        axes.plot(xs, ys, _MARKS[i % len(_MARKS)], color=colour, markersize=6, alpha=0.85, label=part)
        for x, y, name in zip(xs, ys, names, strict=True) if part in _NAMED else ():
            axes.annotate(name, (x, y), xytext=(6, -3), textcoords="offset points", fontsize=6, color=colour)
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    axes.set_ylim(min(y for _, y, _ in every) / 3, max(v for k, v in ceilings.items() if k != "copy") * 4)
    axes.set_xlabel("useful FLOP for each byte that has to move")
    axes.set_ylabel("useful FLOP/s")
    axes.set_title(f"{document['device']['name']}: measured points below measured ceilings")
    axes.grid(which="both", alpha=0.2)
    axes.legend(fontsize=8, loc="lower right")
    picture = BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    write_atomic(path, picture.getvalue())
    return True


def _roofs(axes: Any, ceilings: Mapping[str, float], low: float, high: float) -> None:
    """Draw each ceiling of products from where the memory's slope meets it."""
    slope, tops = ceilings["copy"], {kind: ceilings[kind] for kind in ("bf16", "fp8") if kind in ceilings}
    for kind, top in tops.items():
        axes.plot([top / slope, high], [top, top], color="black", linewidth=1.2)
        note = f"{kind} products {top / 1e12:.4g} TFLOP/s"
        axes.annotate(note, (high, top), xytext=(-4, 4), textcoords="offset points", ha="right", fontsize=8)
    highest = max(tops.values())
    axes.plot([low, highest / slope], [low * slope, highest], color=GREY, linewidth=1.2)
    middle = tops["bf16"] / slope / 10
    note = f"copies {slope / 1e9:.4g} GB/s"
    axes.annotate(note, (middle, middle * slope), xytext=(-6, 4), textcoords="offset points", ha="right", fontsize=8)
