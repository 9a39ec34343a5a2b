"""Plots of a scaling study, as PNG files beside its table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_vlmr1.report.curves import GREY, PALETTE
from megatron_vlmr1.report.scaling_rows import KINDS, Row

Plot = Callable[[Any, Sequence[Row]], bool]


def draw(out: Path, found: Sequence[Row]) -> list[tuple[str, str]]:
    """Draw what the rows have numbers for; return (title, file name) of each plot.

    Raises:
        OSError: the directory cannot be written.
    """
    from matplotlib.figure import Figure

    drawn = []
    for name, title, plot in _PLOTS:
        figure = Figure(figsize=(7.2, 4.0), layout="constrained")
        if plot(figure.add_subplot(), found):
            figure.savefig(out / f"{name}.png", dpi=120)
            drawn.append((title, f"{name}.png"))
        else:
            (out / f"{name}.png").unlink(missing_ok=True)  # of a former report
    return drawn


def _over_nodes(axes: Any, found: Sequence[Row], value: Callable[[Row, str], float | None], unit: str) -> bool:
    """One line for each point and kind of scaling, over the nodes; return whether there is one."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for kind in KINDS:
        for row in found:
            number = value(row, kind) if kind in row.scaling else None
            if number is not None:
                curves.setdefault(f"{row.label}, {kind}", []).append((row.nodes, number))
    for i, (label, points) in enumerate(curves.items()):
        style = "--" if label.endswith("weak") else "-"
        axes.plot(*zip(*sorted(points), strict=True), style, marker="o", color=PALETTE[i % len(PALETTE)], label=label)
    axes.set_xlabel("nodes")
    axes.set_ylabel(unit)
    axes.set_xticks(sorted({row.nodes for row in found}))
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", alpha=0.3)
    if curves:
        axes.legend(fontsize=8)
    return bool(curves)


def _efficiency(axes: Any, found: Sequence[Row]) -> bool:
    axes.axhline(100, color=GREY, linewidth=1)
    return _over_nodes(axes, found, lambda row, kind: _times(row.efficiency.get(kind), 100), "efficiency, %")


def _tokens(axes: Any, found: Sequence[Row]) -> bool:
    return _over_nodes(axes, found, lambda row, kind: row.tokens_per_s_per_gpu, "trained tokens/s/GPU")


def _mfu(axes: Any, found: Sequence[Row]) -> bool:
    return _over_nodes(axes, found, lambda row, kind: _times(row.mfu, 100), "MFU, %")


def _memory(axes: Any, found: Sequence[Row]) -> bool:
    return _over_nodes(axes, found, lambda row, kind: _times(row.memory_bytes, 1e-9), "memory, GB")


def _phases(axes: Any, found: Sequence[Row]) -> bool:
    measured = [row for row in found if row.phases_s]
    names = sorted({name for row in measured for name in row.phases_s})
    left = [0.0] * len(measured)
    for i, name in enumerate(names):
        widths = [row.phases_s.get(name, 0.0) for row in measured]
        axes.barh([row.name for row in measured], widths, left=left, color=PALETTE[i % len(PALETTE)], label=name)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("seconds a step")
    if names:
        axes.legend(fontsize=8)
    return bool(names)


def _rewards(axes: Any, found: Sequence[Row]) -> bool:
    curves = [row for row in found if row.rewards]
    for i, row in enumerate(curves):
        axes.plot(*zip(*row.rewards, strict=True), marker=".", color=PALETTE[i % len(PALETTE)], label=row.name)
    axes.set_xlabel("GPU-hours" if any(row.mfu is not None for row in found) else "rank-hours")
    axes.set_ylabel("mean reward")
    axes.grid(axis="y", alpha=0.3)
    if curves:
        axes.legend(fontsize=8)
    return bool(curves)


def _planned(axes: Any, found: Sequence[Row]) -> bool:
    both = [row for row in found if row.step_s and row.predicted_step_s]
    seconds = [s for row in both for s in (row.step_s, row.predicted_step_s) if s]
    for i, row in enumerate(both):
        axes.plot(row.step_s, row.predicted_step_s, "o", color=PALETTE[i % len(PALETTE)], label=row.name)
    if both:
        axes.loglog([min(seconds), max(seconds)], [min(seconds), max(seconds)], color=GREY, linewidth=1)
        axes.legend(fontsize=8)
    axes.set_xlabel("seconds a step, measured")
    axes.set_ylabel("planned")
    return bool(both)


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else factor * value


_PLOTS: tuple[tuple[str, str, Plot], ...] = (
    ("efficiency", "Scaling efficiency", _efficiency),
    ("tokens", "Trained tokens per second and GPU", _tokens),
    ("mfu", "Model FLOPs utilisation", _mfu),
    ("phases", "Seconds a step by phase", _phases),
    ("memory", "Memory of the fullest rank", _memory),
    ("planned", "Planned and measured seconds a step", _planned),
    ("reward", "Reward over GPU-hours", _rewards),
)
