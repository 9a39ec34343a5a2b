"""What an evaluation found, from the rows of its splits: figures with intervals, by category, as JSON and Markdown."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vlmr1.evaluate.metrics import bootstrap, detection
from megatron_vlmr1.rewards.task import Task

Rows = Sequence[Mapping[str, Any]]

_SPLIT_METRICS = {"detection": detection}
_NOTES = ("intervals", "categories")


def check(task: Task) -> None:
    """Check that the task's metrics of whole splits are known.

    Raises:
        ValueError: one is not, or the task has no boxes for them.
    """
    for name in task.split_metrics:
        if name not in _SPLIT_METRICS:
            raise ValueError(f"task {task.name}: no split metric named {name}; known: {', '.join(_SPLIT_METRICS)}")
        if task.objects is None:
            raise ValueError(f"task {task.name}: the split metric {name} needs the task's objects")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows that `split.write` wrote."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def summarise(rows: Rows, task: Task, counted: Mapping[str, float], seed: int) -> dict[str, Any]:
    """Return a split's figures, None where it does not define one.

    Args:
        rows: one per sample that could be judged, at least one.
        task: names the metrics.
        counted: the figures and counts of `split.evaluate`; metrics of the whole split come before them.
        seed: of the resampling.

    Returns:
        ``{figure: value, …, "intervals": {figure: [low, high]}, "categories": {category: {figure: value}}}``; 95 %
        percentile intervals over the samples, `bootstrap.RESAMPLES` resamples, or `detection.RESAMPLES` for AP.
    """
    means = dict(task.aggregates) | {"reward_mean": "reward"}
    means = {figure: metric for figure, metric in means.items() if figure in counted}
    estimates = dict(zip(means, bootstrap.means(_table(rows, list(means.values())), seed), strict=True))
    whole = {k: v for name in task.split_metrics for k, v in _SPLIT_METRICS[name].estimates(rows, seed).items()}
    figures = {name: found.value for name, found in whole.items()} | dict(counted)
    intervals = {
        name: [found.low, found.high] for name, found in (whole | estimates).items() if math.isfinite(found.low)
    }
    out: dict[str, Any] = {name: _plain(value) for name, value in figures.items()}
    return out | {"intervals": intervals, "categories": _by_category(rows, task, means)}


def _by_category(rows: Rows, task: Task, means: Mapping[str, str]) -> dict[str, dict[str, float | None]]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row.get("category") is not None:
            groups.setdefault(row["category"], []).append(row)
    out = {}
    for name, group in sorted(groups.items()):
        whole = {k: v for metric in task.split_metrics for k, v in _SPLIT_METRICS[metric].figures(group).items()}
        found = bootstrap.column_means(_table(group, list(means.values())))
        values = whole | dict(zip(means, found.tolist(), strict=True))
        out[name] = {figure: _plain(value) for figure, value in values.items()} | {"samples": float(len(group))}
    return out


def _table(rows: Rows, metrics: Sequence[str]) -> bootstrap.Floats:
    """[rows, metrics]; NaN where a row has no value."""
    return np.array(
        [[float("nan") if row[metric] is None else float(row[metric]) for metric in metrics] for row in rows],
        np.float64,
    ).reshape(len(rows), len(metrics))


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def figure_names(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the names of all splits' figures, each once."""
    return list(dict.fromkeys(name for split in results.values() for name in split if name not in _NOTES))


def cell(split: Mapping[str, Any], figure: str) -> str:
    """Return a figure with its interval, as a table shows it."""
    value, bounds = split.get(figure), split.get("intervals", {}).get(figure)
    if value is None:
        return "–"
    return f"{value:.4g}" + (f" [{bounds[0]:.4g}, {bounds[1]:.4g}]" if bounds else "")


def markdown(label: str, task: str, results: Mapping[str, Mapping[str, Any]], pictures: Sequence[str]) -> str:
    """Return the page of an evaluation.

    Args:
        label: its name.
        task: the task's name.
        results: `summarise` by split.
        pictures: names of the splits that have a ``LABEL_SPLIT_worst.png``.
    """
    lines = [f"# {label}: {task}", "", "Value [95 % interval, bootstrap over samples].", ""]
    lines += _rows("figure", results, figure_names(results))
    for name, split in results.items():
        if split["categories"]:
            lines += ["", f"## {name} by category", ""]
            lines += _rows("figure", split["categories"], figure_names(split["categories"]))
        if name in pictures:
            lines += ["", f"## {name}: worst answers", "", f"![{name}]({label}_{name}_worst.png)"]
    return "\n".join(lines) + "\n"


def _rows(corner: str, columns: Mapping[str, Mapping[str, Any]], figures: Sequence[str]) -> list[str]:
    """A Markdown table with one row a column's name, so that many categories grow downwards."""
    head = [corner, *columns] if len(columns) <= 4 else ["", *figures]
    body = (
        [[figure, *(cell(column, figure) for column in columns.values())] for figure in figures]
        if len(columns) <= 4
        else [[name, *(cell(column, figure) for figure in figures)] for name, column in columns.items()]
    )
    return [f"| {' | '.join(map(_escaped, row))} |" for row in (head, ["---"] * len(head), *body)]


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
