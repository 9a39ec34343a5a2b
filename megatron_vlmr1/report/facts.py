"""Facts and figures of a run, as rows of text."""

from __future__ import annotations

import datetime
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_vlmr1.report.curves import Series, series_of
from megatron_vlmr1.report.numbers import number
from megatron_vlmr1.report.run import EVALUATIONS, Answer, Run
from megatron_vlmr1.telemetry.console import duration
from megatron_vlmr1.telemetry.timers import PHASES

_SPLIT_NAMES = {"heldout": "Held-out", "ood": "Out of domain"}  # others go by their own
# label, name of the figure, how it was answered, shown as percent
_MEASURES = (
    ("Acc@0.5", "acc50", "greedy", True),
    ("Mean IoU", "iou_mean", "greedy", False),
    ("mAP", "map", "greedy", False),
    ("AP50", "ap50", "greedy", False),
    ("NMS-AP", "nms_ap", "greedy", False),
    ("Accuracy", "accuracy", "greedy", True),
    ("Mean absolute error", "mae", "greedy", False),
    ("Format rate", "format_rate", "greedy", True),
    ("Mean reward", "reward_mean", "sampled at T = 1", False),
)
_LIST_ITEMS = 6
_SLOW_RATIO, _SLOW_SHARE = 1.5, 0.05  # times the others' median, and of a step: what counts as held up


@dataclass(frozen=True)
class Change:
    """One figure before and after, as text."""

    before: str
    after: str
    delta: str
    direction: str  # up, down or same


@dataclass(frozen=True)
class Measure:
    """One row of the before/after table: a change (or None) for each split."""

    label: str
    note: str
    changes: tuple[Change | None, ...]


def comparison(run: Run) -> tuple[list[str], list[Measure], list[str]]:
    """Return the splits that were measured, the table's rows, and notes on the spread; empty without evaluations."""
    measures = []
    for label, key, note, percent in _MEASURES:
        changes = tuple(
            _change(_figure(t, "before", key), _figure(t, "after", key), percent) for t in run.figures.values()
        )
        if any(changes):
            measures.append(Measure(label, note, changes))
    names = {split: _SPLIT_NAMES.get(split, split) for split in run.figures}
    notes = [note for s, name in names.items() if (note := _paired_note(name, run.evaluations.get(s, {})))]
    return list(names.values()), measures, notes


def accuracy_series(run: Run) -> dict[str, Series]:
    """Return Acc@0.5 by split: from the metrics, with the evaluations' figures at both ends of the run."""
    names = sorted({name for _, values in run.metrics for name in values})
    points: dict[str, dict[int, float]] = {}
    for name in names:
        if name.startswith("evaluate/") and name.endswith("/acc50"):
            steps, values = series_of(run.metrics, name)
            points[name.removeprefix("evaluate/").removesuffix("/acc50")] = dict(zip(steps, values, strict=True))
    done = run.metrics[-1][0] + 1 if run.metrics else 1
    for split, table in run.figures.items():
        measured = points.setdefault(split, {})
        # A split measured in training at the very end keeps that figure: the two may differ in samples.
        for step, side, missing in ((0, "before", 0 not in measured), (done, "after", done - 1 not in measured)):
            figure = _figure(table, side, "acc50")
            if figure is not None and missing:
                measured.setdefault(step, figure)
    ordered = {split: sorted(values.items()) for split, values in sorted(points.items()) if values}
    return {split: ([s for s, _ in pairs], [v for _, v in pairs]) for split, pairs in ordered.items()}


def headline(run: Run) -> list[str]:
    """Return the few facts that stand under the title."""
    method = str(run.setting("method") or "").upper()
    generations = run.setting("rollout.num_generations") if method == "GRPO" else None
    batch = run.setting("train.prompts_per_step")
    batch_text = f"{batch} prompts × {generations}" if generations else f"{batch} samples"
    steps = run.metrics[-1][0] + 1 if run.metrics else 0
    finished = max((values.get("unix_s", 0.0) for _, values in run.metrics), default=0.0)
    facts = [
        method,
        f"{steps:,} step{'s' * (steps != 1)}",
        f"{batch_text} a step" if batch else "",
        _layout(run),
        _precision(run),
        f"seed {run.setting('seed')}" if run.setting("seed") is not None else "",
        f"{datetime.datetime.fromtimestamp(finished, datetime.UTC):%Y-%m-%d %H:%M} UTC" if 0 < finished < 1e11 else "",
    ]
    return [fact for fact in facts if fact]


def setup(run: Run) -> list[tuple[str, str]]:
    """Return name and value of what summary.json says besides figures and seconds, and the main settings."""
    settings = ("model.path", "data.train", "task", "optimizer.lr", "grpo.beta", "train.micro_batch_tokens", "device")
    rows = [(name, describe(run.setting(name))) for name in settings if run.setting(name) is not None]
    taken = {*EVALUATIONS, "seconds"}
    return (
        rows
        + [(str(key), describe(value)) for key, value in run.summary.items() if key not in taken]
        + slow_rank(run)
        + peak_memory(run)
    )


def peak_memory(run: Run) -> list[tuple[str, str]]:
    """Return a line on the most memory of a GPU in each phase, and what was planned, where that was measured."""
    parts = []
    for phase in PHASES:
        found, plan = (_most(run, f"memory/{kind}_{phase}_bytes") for kind in ("peak", "plan"))
        if found:
            parts.append(f"{phase} {found / 1e9:.2f} GB" + (f" (planned at most {plan / 1e9:.2f})" if plan else ""))
    return [("peak memory of a GPU", ", ".join(parts))] if parts else []


def _most(run: Run, name: str) -> float:
    return max((values.get(name, 0.0) for _, values in run.metrics), default=0.0)


def slow_rank(run: Run) -> list[tuple[str, str]]:
    """Return a line on the rank and phase that most often held the others up, if any did."""
    slow: dict[tuple[int, int], list[float]] = {}
    for _, values in run.metrics:
        ratio, excess_s = values.get("straggler/ratio", 0.0), values.get("straggler/excess_s", 0.0)
        if ratio >= _SLOW_RATIO and excess_s >= _SLOW_SHARE * values.get("perf/step_s", 0.0) > 0:
            slow.setdefault((int(values["straggler/rank"]), int(values["straggler/phase"])), []).append(ratio)
    if not slow:
        return []
    (rank, phase), ratios = max(slow.items(), key=lambda item: len(item[1]))
    times = f"{statistics.median(ratios):.1f} times the others' median"
    return [("slowest rank", f"rank {rank} in {PHASES[phase]}, {times} in {len(ratios)} of {len(run.metrics)} steps")]


def seconds(run: Run) -> list[tuple[str, str, float]]:
    """Return phase, duration and share of the longest phase."""
    table = run.summary.get("seconds")
    if not isinstance(table, dict):
        return []
    rows = [(str(name), value) for name, raw in table.items() if (value := number(raw)) is not None and value >= 0]
    longest = max((value for _, value in rows), default=0.0) or 1.0
    return [(name, f"{value:.1f}s" if value < 60 else duration(value), value / longest) for name, value in rows]


def describe(value: Any) -> str:
    """Return a JSON value as one short line."""
    if isinstance(value, dict):
        return " · ".join(f"{key} {describe(item)}" for key, item in value.items())
    if isinstance(value, list):
        text = ", ".join(describe(item) for item in value[:_LIST_ITEMS])
        return text + (f", … ({len(value)} in all)" if len(value) > _LIST_ITEMS else "")
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)


def _precision(run: Run) -> str:
    """Return bf16, or fp8 with its recipe; older runs have the word alone."""
    recipe, dtype = run.setting("precision.fp8"), run.setting("precision.dtype") or run.setting("precision")
    return f"fp8 {recipe}" if recipe not in (None, "none") else str(dtype or "")


def _layout(run: Run) -> str:
    parallel = run.summary.get("parallel")
    table: Mapping[str, Any] = parallel if isinstance(parallel, dict) else {}
    names = (("TP", "tensor_model_parallel_size"), ("PP", "pipeline_model_parallel_size"), ("DP", "data_parallel_size"))
    sizes = [(short_, table.get(name, run.setting(f"parallel.{name}"))) for short_, name in names]
    return " ".join(f"{name} {size}" for name, size in sizes if size is not None)


def _figure(table: Mapping[str, Mapping[str, Any]], label: str, key: str) -> float | None:
    return number(table[label].get(key)) if label in table else None


def _change(before: float | None, after: float | None, percent: bool) -> Change | None:
    if before is None and after is None:
        return None
    scale, digits, unit = (100, 1, " %") if percent else (1, 3, "")
    was, became = ("–" if side is None else f"{scale * side:.{digits}f}{unit}" for side in (before, after))
    if before is None or after is None:
        return Change(was, became, "", "same")
    delta = round(scale * (after - before), digits)
    sign = "+" if delta > 0 else "−" if delta < 0 else "±"
    direction = "up" if delta > 0 else "down" if delta < 0 else "same"
    return Change(was, became, f"{sign}{abs(delta):.{digits}f}", direction)


def _paired_note(name: str, answers: Mapping[str, Sequence[Answer]]) -> str:
    """Mean change of Acc@0.5 over the samples that both evaluations hold, with its standard error."""
    first = {row.key: row.acc50 for row in answers.get("before", ())}
    pairs = [(first.get(row.key), row.acc50) for row in answers.get("after", ())]
    changes = [b - a for a, b in pairs if a is not None and b is not None]
    if len(changes) < 2:
        return ""
    mean = sum(changes) / len(changes)
    error = math.sqrt(sum((change - mean) ** 2 for change in changes) / (len(changes) - 1) / len(changes))
    sign = "−" if mean < 0 else "+"
    return f"{name.lower()} {sign}{abs(100 * mean):.1f} ± {100 * error:.1f} points (n = {len(changes)})"
