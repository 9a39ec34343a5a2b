"""A calibration from what was measured: phases of finished runs, and single rates of a benchmark. No torch.

A benchmark says a rate itself, in a JSON list of rows {"name", "unit", "value"} by `RATES`, which may be the value of
"rates" in a document (`tools/bench/gpu.py` writes one). A finished run says the seconds of whole phases; the numbers
that explain them best are searched for by damped Gauss-Newton on logarithms (D. Marquardt, 1963), held near the numbers
that there were by a weak prior: what the runs say nothing about stays.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt

from megatron_vlmr1 import config
from megatron_vlmr1.plan.hardware import CALIBRATED, Hardware, calibrated, number
from megatron_vlmr1.plan.shapes import PlanShape, read_plan_shape
from megatron_vlmr1.plan.time import PHASES, Program, program, step_time, useful_flops
from megatron_vlmr1.plan.workload import Workload, grid_of, workload
from megatron_vlmr1.telemetry.metrics import read_metrics

Numbers = npt.NDArray[np.float64]

RATES = {
    "matmul_large": "FLOP/s",
    "matmul_medium": "FLOP/s",
    "matmul_small": "FLOP/s",
    "attention": "FLOP/s",
    "memory": "B/s",
    "decode": "B/s",
    "nvlink": "B/s",
    "network": "B/s",
    "pcie": "B/s",
    "nvlink_latency": "s",
    "network_latency": "s",
    "launch": "s",
    "tick": "s",
}
"""What a benchmark may measure, and its unit: matrix products in bf16 by their size class, attention by useful pairs,
bytes moved, bytes that a rank sends in a ring; seconds of a collective's hop, of launching a kernel, of a tick."""

_PRIOR = 0.003  # weight of the numbers that there were, against one phase; a doubling costs what half a percent does
_ROUNDS = 60
_SHORTEST_S = 1e-3  # phases that are shorter are no evidence
_NEEDED = ("train/tokens", "time/update", "perf/step_s", "perf/lm_flops")  # of a step that says anything
_WARM_UP = 2  # steps that are left out, where there are more


@dataclass(frozen=True)
class Observation:
    """A step that was measured: what it was, and the seconds of its phases."""

    name: str
    shape: PlanShape
    how: Program
    work: Workload
    seconds: Mapping[str, float]  # by phase of `PHASES`


def observe(run_dir: Path, per_node: int) -> Observation:
    """Read a finished run: medians over its steps.

    What its prompts were like is not on record, but their FLOPs are: lengths and images are those that give them.

    Raises:
        ValueError: RUN_DIR is not a finished run, or has no step to learn from; one line.
    """
    path = run_dir / "config.yaml"
    cfg = config.load(path)
    shape = read_plan_shape(cfg.model.path)
    try:
        world = int(json.loads((run_dir / "facts.json").read_text(encoding="utf-8"))["parallel"]["world"])
        if world < 1:
            raise ValueError(world)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{run_dir / 'facts.json'}: not there or damaged: is it a finished run?") from error
    rows = [row for _, row in read_metrics(run_dir) if all(row.get(name) for name in _NEEDED)]
    rows = rows[_WARM_UP:] or rows
    if not rows:
        raise ValueError(f"{run_dir / 'metrics.jsonl'}: no step that was trained on")
    middle = {name: median(row.get(name, 0.0) for row in rows) for row in rows[:1] for name in row}
    how = program(cfg, shape.text.num_layers, world, per_node)
    if cfg.debug.replay_rollouts is not None or cfg.debug.skip_update:
        raise ValueError(f"{run_dir}: debug.* left out half of its steps")
    return Observation(str(run_dir), shape, how, _work(cfg, shape, how, middle), _seconds(middle))


def _seconds(middle: Mapping[str, float]) -> dict[str, float]:
    """Return the seconds of each phase; other is what no timer counts."""
    out = {phase: middle[f"time/{phase}"] for phase in PHASES if f"time/{phase}" in middle}
    aside = sum(value for name, value in middle.items() if name.startswith("time/"))
    out["other"] = middle["perf/step_s"] - aside
    return {phase: seconds for phase, seconds in out.items() if seconds >= _SHORTEST_S}


def _work(cfg: config.Config, shape: PlanShape, how: Program, middle: Mapping[str, float]) -> Workload:
    """Return prompts and completions of a run's steps."""
    completions = cfg.train.prompts_per_step * (cfg.rollout.num_generations if how.grpo else 1)
    mean = middle.get("rollout/length_mean", middle["train/tokens"] / completions)
    mean = min(float(cfg.rollout.max_new_tokens), max(1.0, mean))
    work = workload(cfg, None, completion_tokens=mean)

    def of_prompt(tokens: float) -> float:
        return useful_flops(shape, how, replace(work, prompt_tokens=tokens))[0]

    work = replace(work, prompt_tokens=_solved(of_prompt, middle["perf/lm_flops"], cfg.data.max_prompt_tokens))
    if shape.vision is None or not middle.get("perf/vit_flops"):
        return work
    vision = shape.vision

    def of_image(tokens: float) -> float:
        return useful_flops(shape, how, replace(work, grid=grid_of(vision, tokens)))[1]

    tokens = _solved(of_image, middle["perf/vit_flops"], cfg.data.max_prompt_tokens)
    return replace(work, grid=grid_of(vision, tokens))


def _solved(function: Callable[[float], float], wanted: float, most: float) -> float:
    """Return where a rising function has a value, from 1 to `most`."""
    low, high = 1.0, float(most)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < wanted else (low, middle)
    return (low + high) / 2


def from_benchmark(hardware: Hardware, path: Path) -> Hardware:
    """Return the hardware with the rates that a benchmark measured.

    Raises:
        ValueError: the file has no list of rows {"name", "unit", "value"} by `RATES`; one line.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(rows, dict):
            rows = rows.get("rates")
        if not isinstance(rows, list) or not rows:
            raise ValueError("there is no row")
        measured = {str(row["name"]): (str(row["unit"]), float(row["value"])) for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path}: not a list of {{"name", "unit", "value"}}: {error}') from error
    values = {}
    for name, (unit, value) in measured.items():
        if RATES.get(name) != unit:
            known = ", ".join(f"{key} in {of}" for key, of in RATES.items())
            raise ValueError(f"{path}: {name} in {unit} is not known; known: {known}")
        if unit == "s":
            values[f"overheads.{name}_s"] = value
        else:
            values[f"efficiency.{name}"] = value / _peak(hardware, name)
    try:
        return calibrated(hardware, values, f"measured: {path.name}")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _peak(hardware: Hardware, name: str) -> float:
    """Return what a rate is a share of."""
    if RATES[name] == "FLOP/s":
        return hardware.peak("bf16")
    link = "memory" if name == "decode" else name
    return float(getattr(hardware, f"{link}_bytes_per_s").value)


def fit(hardware: Hardware, observations: Sequence[Observation]) -> Hardware:
    """Return the hardware with the calibration that explains the observations best.

    Raises:
        ValueError: no observation has a phase to learn from.
    """
    keys = [(o, phase) for o in observations for phase in o.seconds]
    if not keys:
        raise ValueError("nothing to fit: no run has a phase that took a millisecond")
    wanted = np.log([o.seconds[phase] for o, phase in keys])
    start = np.array([_to_line(name, number(hardware, name)) for name in CALIBRATED])

    def residuals(at: Numbers) -> Numbers:
        now = _with(hardware, at)
        known = {id(o): predicted(now, o) for o in observations}
        off = np.array([math.log(known[id(o)][phase]) for o, phase in keys]) - wanted
        return np.concatenate((off, math.sqrt(_PRIOR / len(keys)) * (at - start)))

    values = _least_squares(residuals, start)
    names = ", ".join(Path(o.name).name for o in observations)
    found = {name: _from_line(name, value) for name, value in zip(CALIBRATED, values, strict=True)}
    moved = {name: value for name, value in found.items() if abs(value / number(hardware, name) - 1) > 0.01}
    return calibrated(hardware, moved, f"fitted: phases of {names}")


def predicted(hardware: Hardware, observation: Observation) -> dict[str, float]:
    """Return the predicted seconds of the phases that were measured."""
    step = step_time(hardware, observation.shape, observation.how, observation.work)
    return {phase: max(1e-9, step.phases[phase].seconds) for phase in observation.seconds}


def error(hardware: Hardware, observations: Sequence[Observation]) -> float:
    """Return the mean absolute logarithm of predicted over measured, as a factor less one: 0.2 is 20 % off."""
    logs = []
    for o in observations:
        known = predicted(hardware, o)
        logs += [abs(math.log(known[phase] / seconds)) for phase, seconds in o.seconds.items()]
    return math.exp(sum(logs) / len(logs)) - 1


def _least_squares(function: Callable[[Numbers], Numbers], start: Numbers) -> Numbers:
    """Return where the sum of squares is least."""
    at, damping = start.copy(), 1e-2
    here = function(at)
    for _ in range(_ROUNDS):
        slopes = np.stack([(function(at + step) - here) / 1e-4 for step in np.eye(len(at)) * 1e-4], 1)
        square = slopes.T @ slopes
        move = np.linalg.solve(square + damping * np.diag(np.diag(square)), -slopes.T @ here)
        move = np.clip(move, -1.0, 1.0)
        there = function(at + move)
        if there @ there < here @ here:
            done = here @ here - there @ there < 1e-12 * (here @ here)
            at, here, damping = at + move, there, damping / 5
            if done:
                break
        else:
            damping *= 5
            if damping > 1e8:
                break
    return at


def _with(hardware: Hardware, at: Numbers) -> Hardware:
    values = {name: _from_line(name, value) for name, value in zip(CALIBRATED, at, strict=True)}
    return calibrated(hardware, values, "fitted")


def _to_line(name: str, value: float) -> float:
    """Map a share from (0, 1), or seconds from above 0, to the whole line."""
    if name.startswith("efficiency."):
        value = min(value, 1 - 1e-6)
        return math.log(value / (1 - value))
    return math.log(value)


def _from_line(name: str, at: float) -> float:
    if name.startswith("efficiency."):
        return float(1 / (1 + math.exp(-min(30.0, max(-30.0, at)))))
    return float(math.exp(at))
