"""What a scaling study measured: a row for each cell, and efficiencies."""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_vlmr1 import config
from megatron_vlmr1.plan.fit import observe, predicted
from megatron_vlmr1.plan.hardware import Hardware
from megatron_vlmr1.plan.memory import rank_memory
from megatron_vlmr1.plan.study import CELLS, DONE
from megatron_vlmr1.telemetry.metrics import MetricRows, read_metrics

log = logging.getLogger(__name__)

KINDS = ("strong", "weak")


@dataclass
class Row:
    """One cell. What was not measured is None."""

    name: str
    nodes: int
    ranks: int
    point: dict[str, str]
    scaling: tuple[str, ...]
    state: str
    reason: str
    steps: int = 0  # measured ones
    step_s: float | None = None  # median, without evaluations and saves
    prompts_per_s: float | None = None  # all ranks
    tokens_per_s_per_gpu: float | None = None
    mfu: float | None = None  # language and vision; None where the device's peak is not known
    memory_bytes: float | None = None  # of the fullest GPU; of rank 0's process where there is none
    reward: float | None = None  # mean of the last tenth of the steps
    gpu_hours: float | None = None
    phases_s: dict[str, float] = field(default_factory=dict)  # mean of each phase
    rewards: tuple[tuple[float, float], ...] = ()  # (GPU-hours, mean reward) after each step
    predicted_step_s: float | None = None  # by the plan, of what the steps were
    predicted_memory_bytes: float | None = None  # by the plan, of the largest step that the config allows
    efficiency: dict[str, float] = field(default_factory=dict)  # by kind of scaling

    @property
    def label(self) -> str:
        """The point of all axes, which a curve over the nodes belongs to."""
        return " ".join(self.point.values()) or "all"

    def document(self) -> dict[str, Any]:
        """Return the row as one flat mapping, for csv and JSON."""
        flat: dict[str, Any] = {"cell": self.name, "nodes": self.nodes, "ranks": self.ranks, **self.point}
        flat |= {"scaling": "+".join(self.scaling), "state": self.state, "reason": self.reason, "steps": self.steps}
        for name in ("step_s", "prompts_per_s", "tokens_per_s_per_gpu", "mfu", "memory_bytes", "reward", "gpu_hours"):
            flat[name] = getattr(self, name)
        flat |= {name: getattr(self, name) for name in ("predicted_step_s", "predicted_memory_bytes")}
        flat |= {f"{kind}_efficiency": self.efficiency.get(kind) for kind in KINDS}
        return flat | {f"{phase}_s": seconds for phase, seconds in self.phases_s.items()}


def read(out: Path, hardware: Hardware) -> list[Row]:
    """Read a study's directory.

    Args:
        out: the directory.
        hardware: what the jobs ran on, for what the plan predicts.

    Raises:
        ValueError: it is none; one line.
    """
    try:
        document = json.loads((out / CELLS).read_bytes())
        warmup = int(document["warmup_steps"])
        found = [_row(cell, out / "cells", warmup, hardware) for cell in document["cells"]]
    except FileNotFoundError as error:
        raise ValueError(f"{out}: no scaling study ({CELLS} is missing); `vlmr1 scaling run` makes one") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{out / CELLS}: not what a study writes ({error!r})") from error
    for row in found:
        _compare(row, found)
    return found


def _row(cell: Mapping[str, Any], runs: Path, warmup: int, hardware: Hardware) -> Row:
    point = {str(axis): str(label) for axis, label in cell["point"].items()}
    row = Row(
        name=str(cell["name"]),
        nodes=int(cell["nodes"]),
        ranks=int(cell["ranks"]),
        point=point,
        scaling=tuple(str(kind) for kind in cell["scaling"]),
        state=str(cell["state"]),
        reason=str(cell["reason"]),
    )
    run_dir = runs / Path(row.name).name  # and not what the file says: a study can be moved
    metrics = read_metrics(run_dir)
    measured = [values for step, values in metrics if step >= warmup]
    if measured:
        _measure(row, metrics, measured)
    if row.state == DONE:
        _predict(row, run_dir, hardware)
    return row


def _predict(row: Row, run_dir: Path, hardware: Hardware) -> None:
    """Let the plan say what the measured steps should have taken; nothing where a run is no evidence."""
    try:
        seen = observe(run_dir, hardware.devices_per_node)
        row.predicted_step_s = sum(predicted(hardware, seen).values())
        cfg = config.load(run_dir / "config.yaml")
        row.predicted_memory_bytes = max(r.worst()[1] for r in rank_memory(cfg, seen.shape, row.ranks, hardware.device))
    except ValueError as error:
        log.warning("%s is not compared with the plan: %s", row.name, error)


def _measure(row: Row, metrics: MetricRows, measured: Sequence[Mapping[str, float]]) -> None:
    row.steps = len(measured)
    seconds = [_training_s(values) for values in measured]
    row.step_s = statistics.median(seconds)
    prompts = [values["data/consumed"] for _, values in metrics]
    if len(prompts) > 1 and row.step_s:
        row.prompts_per_s = (prompts[-1] - prompts[0]) / (len(prompts) - 1) / row.step_s
    row.tokens_per_s_per_gpu = _median(measured, "perf/tokens_per_s_per_gpu")
    language, vision = _median(measured, "perf/mfu_lm"), _median(measured, "perf/mfu_vit")
    row.mfu = None if language is None else language + (vision or 0.0)
    memory = [values.get("gpu/mem_bytes", values.get("host/rss_bytes", 0.0)) for values in measured]
    row.memory_bytes = max(memory) or None
    phases = {name for values in measured for name in values if name.startswith("time/")}
    row.phases_s = {
        name.removeprefix("time/"): statistics.fmean(values.get(name, 0.0) for values in measured)
        for name in sorted(phases)
    }
    hours, curve = 0.0, []
    for _, values in metrics:
        hours += values.get("perf/step_s", 0.0) * row.ranks / 3600
        if "reward/mean" in values:
            curve.append((hours, values["reward/mean"]))
    row.gpu_hours, row.rewards = hours, tuple(curve)
    last = curve[-max(1, len(curve) // 10) :]
    row.reward = statistics.fmean(reward for _, reward in last) if last else None


def _training_s(values: Mapping[str, float]) -> float:
    aside = values.get("time/evaluate", 0.0) + values.get("time/save_exposed", 0.0)
    return values["perf/step_s"] - aside


def _median(measured: Sequence[Mapping[str, float]], name: str) -> float | None:
    found = [values[name] for values in measured if name in values]
    return statistics.median(found) if found else None


def _compare(row: Row, every: Sequence[Row]) -> None:
    """Prompts a second and rank, beside those at the fewest nodes of the same curve.

    With the same prompts a step that is t1 n1 / (tn n), strong scaling; with prompts that grow with the ranks t1 / tn,
    weak scaling.
    """
    for kind in row.scaling:
        curve = [r for r in every if kind in r.scaling and r.point == row.point and r.state == DONE]
        base = min(curve, key=lambda r: r.nodes, default=None)
        if row.state == DONE and base is not None and row.prompts_per_s and base.prompts_per_s:
            row.efficiency[kind] = row.prompts_per_s / row.ranks / (base.prompts_per_s / base.ranks)
