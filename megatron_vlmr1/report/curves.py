"""Curves of a run as inline SVG: one small chart per metric, and phase times as a stack.

No text from a run enters an SVG: names and legends are the page's, which escapes them.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_vlmr1.report.numbers import tick
from megatron_vlmr1.telemetry.metrics import MetricRows

Series = tuple[list[int], list[float]]  # steps, values
Floats = npt.NDArray[np.float64]

# Okabe and Ito's colours, told apart by the colour-blind.
BLUE, ORANGE, GREEN, PINK, SKY, RED, YELLOW, GREY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#C9B800",
    "#9AA0A6",
)
PALETTE = (BLUE, ORANGE, GREEN, PINK, SKY, RED, YELLOW)
_INK, _GRID = "#57534e", "#e7e5e4"
_MAX_POINTS = 400
SMOOTHED_FROM = 24  # points; a shorter curve is drawn with its dots

# title, unit or explanation, metric
_CURVES = (
    ("Reward", "mean over the step's completions", "reward/mean"),
    ("IoU reward", "part of the reward", "reward/iou"),
    ("Format reward", "part of the reward", "reward/format"),
    ("KL to the reference", "nats per token", "grpo/kl"),
    ("Entropy", "nats per token", "grpo/entropy"),
    ("Completion length", "tokens", "rollout/length_mean"),
    ("Gradient norm", "before clipping", "train/grad_norm"),
    ("Learning rate", "", "train/lr"),
)
_LOSS = ("Loss", "nats per token", "train/loss")


@dataclass(frozen=True)
class Chart:
    """One chart of the page."""

    title: str
    note: str
    svg: str
    ends: tuple[float, float] | None = None  # mean of the first and of the last tenth of the steps
    legend: tuple[tuple[str, str, float, float], ...] = ()  # colour, label, first value, last value


@dataclass(frozen=True)
class Phase:
    """One phase of the stack's legend."""

    name: str
    colour: str
    mean_s: float
    share: float


def main_charts(rows: MetricRows, accuracy: Mapping[str, Series]) -> list[Chart]:
    """Return the charts that a reader looks at first, as far as the run has their metrics.

    Args:
        rows: the run's metrics.
        accuracy: Acc@0.5 by split.
    """
    charts = [
        _single(title, note, series) for title, note, metric in _curves(rows) if (series := series_of(rows, metric))[0]
    ]
    if accuracy:
        coloured = [(split, series, PALETTE[i % len(PALETTE)]) for i, (split, series) in enumerate(accuracy.items())]
        svg = _lines([(series, colour) for _, series, colour in coloured], dots=True)
        legend = tuple((colour, split, values[0], values[-1]) for split, (_, values), colour in coloured)
        charts.insert(min(3, len(charts)), Chart("Acc@0.5", "greedy answers", svg, legend=legend))
    return charts


def further_charts(rows: MetricRows, limit: int = 60) -> list[Chart]:
    """Return charts of the metrics that have no other place on the page, by name."""
    names = sorted({name for _, values in rows for name in values})
    shown = {metric for _, _, metric in _curves(rows)} | {"unix_s"}
    rest = [n for n in names if n not in shown and not n.startswith("time/") and not re.match(r"evaluate/.*/acc50$", n)]
    return [_single(name, "", series) for name in rest[:limit] if (series := series_of(rows, name))[0]]


def _curves(rows: MetricRows) -> tuple[tuple[str, str, str], ...]:
    # GRPO's loss is zero by construction while the policy is the sampling policy: it misleads more than it tells.
    rewarded = any("reward/mean" in values for _, values in rows)
    return _CURVES if rewarded else (_LOSS, *_CURVES)


def series_of(rows: MetricRows, metric: str) -> Series:
    """Return the steps and finite values of a metric."""
    points = [(step, values[metric]) for step, values in rows if metric in values and np.isfinite(values[metric])]
    return [step for step, _ in points], [value for _, value in points]


def phase_chart(rows: MetricRows) -> tuple[str, list[Phase]] | None:
    """Return seconds per step as a stack of phases (SVG) and its legend, or None for a run without phase times."""
    timed = [(step, phases) for step, values in rows if (phases := _phases(values))]
    if not timed:
        return None
    present = {name for _, phases in timed for name in phases}
    table = {name: np.array([phases.get(name, 0.0) for _, phases in timed]) for name in present}
    names = sorted(table, key=lambda name: (-float(table[name].mean()), name))
    colours = {name: PALETTE[i] if i < len(PALETTE) else GREY for i, name in enumerate(names)}
    total = sum(float(column.mean()) for column in table.values())
    legend = [Phase(n, colours[n], float(table[n].mean()), float(table[n].mean()) / total) for n in names]
    edges, columns = _binned_edges([step for step, _ in timed], [table[name] for name in names])
    figure, axes = new_figure(10.2, 2.5)
    tall = [np.append(column, column[-1]) for column in columns]
    axes.stackplot(edges, tall, colors=[colours[name] for name in names], step="post", linewidth=0)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(bottom=0)
    return svg_text(figure), legend


def _phases(values: Mapping[str, float]) -> dict[str, float]:
    """Seconds of each phase of one step."""
    return {name[5:]: seconds for name, seconds in values.items() if name.startswith("time/") and 0 < seconds < np.inf}


def _single(title: str, note: str, series: Series) -> Chart:
    values = series[1]
    tenth = max(1, len(values) // 10)
    ends = (float(np.mean(values[:tenth])), float(np.mean(values[-tenth:]))) if len(values) > 1 else None
    return Chart(title, note, _lines([(series, BLUE)]), ends)


def _lines(series: Sequence[tuple[Series, str]], dots: bool = False) -> str:
    figure, axes = new_figure(3.5, 1.65)
    for (steps, values), colour in series:
        x, y = _thin(steps, values)
        if dots or len(y) < SMOOTHED_FROM:
            axes.plot(x, y, color=colour, linewidth=1.6, marker="o", markersize=3.2, markeredgewidth=0)
        elif np.abs(np.diff(y)).sum() <= 3 * np.ptp(y):  # hardly wobbles, as a learning rate: nothing to smooth
            axes.plot(x, y, color=colour, linewidth=1.8)
        else:
            axes.plot(x, y, color=colour, linewidth=0.7, alpha=0.35)
            axes.plot(x, _smooth(y, len(y) // 12), color=colour, linewidth=1.8, solid_capstyle="round")
    axes.margins(x=0.02, y=0.12)
    every_step = {step for (steps, _), _ in series for step in steps}
    if len(every_step) == 1:
        axes.set_xticks(sorted(every_step))
    return svg_text(figure)


def _thin(steps: Sequence[int], values: Sequence[float]) -> tuple[Floats, Floats]:
    """Average neighbours so that at most `_MAX_POINTS` points are left."""
    chunks = np.array_split(np.arange(len(steps)), min(_MAX_POINTS, len(steps)))
    x, y = np.asarray(steps, np.float64), np.asarray(values, np.float64)
    return np.array([x[c].mean() for c in chunks]), np.array([y[c].mean() for c in chunks])


def _smooth(values: Floats, window: int) -> Floats:
    """Centred moving average that shrinks at the ends."""
    half = window // 2
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _binned_edges(steps: Sequence[int], columns: Sequence[Floats], bins: int = 160) -> tuple[Floats, list[Floats]]:
    """Average columns over runs of neighbouring steps; return the runs' borders (one more than values)."""
    chunks = np.array_split(np.arange(len(steps)), min(bins, len(steps)))
    edges = np.array([steps[chunk[0]] for chunk in chunks] + [steps[-1] + 1], np.float64)
    return edges, [np.array([column[chunk].mean() for chunk in chunks]) for column in columns]


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    """Return an empty chart of so many inches, in the page's style."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    axes.grid(axis="y", color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, labelsize=7.5, length=0, pad=3)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    return figure, axes


def svg_text(figure: Any) -> str:
    """Return the figure as an <svg> element whose text takes the page's font."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "vlmr1"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # Width and height go, the viewBox stays: the page decides how large it is.
    return re.sub(r'^<svg ([^>]*?)\bheight="[^"]*"([^>]*?)\bwidth="[^"]*"', r"<svg \1\2", text, count=1)
