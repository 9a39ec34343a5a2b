"""What the nodes did while the run went on: utilisation, power and memory over time, the phases behind them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vlmr1.report.curves import BLUE, GREY, PALETTE, Floats, new_figure, svg_text
from megatron_vlmr1.report.numbers import number
from megatron_vlmr1.telemetry.timers import PHASES

_NODES = 4  # that are shown
_MAX_SAMPLES = 2000  # of one node that are read
_BINS = 240
_GAP = 10.0  # times the usual time between samples: nobody ran meanwhile
_COLOURS = dict(zip(PHASES, [*PALETTE, GREY], strict=False))


@dataclass(frozen=True)
class Machine:
    """One node: (title, SVG) of its charts, and (colour, phase) behind them."""

    name: str
    charts: tuple[tuple[str, str], ...]
    phases: tuple[tuple[str, str], ...]


def machines(run_dir: Path) -> tuple[list[Machine], int]:
    """Return the first nodes that have samples, and how many there are; torn lines are left out."""
    files = sorted((run_dir / "telemetry").glob("node_*.jsonl"))
    found = [_machine(file) for file in files[:_NODES]]
    return [machine for machine in found if machine is not None], len(files)


def _machine(file: Path) -> Machine | None:
    rows = list(_rows(file))
    if len(rows) < 2:
        return None
    times = np.array([row["unix_s"] for row in rows], np.float64)
    phases = _phase_spans(times - times[0], [str(row.get("phase")) for row in rows])
    columns = {title: np.array(values, np.float64) for title, values in _columns(rows).items()}
    shown = {title: values for title, values in columns.items() if np.isfinite(values).any()}
    charts = tuple((title, _chart(times, values, phases)) for title, values in shown.items())
    legend = tuple((_COLOURS[phase], phase) for phase in PHASES if phase in {name for _, _, name in phases})
    return Machine(file.stem.removeprefix("node_"), charts, legend)


def _rows(file: Path) -> Iterator[Mapping[str, Any]]:
    """Every so many lines of a file that may be large."""
    with file.open("rb") as lines:
        stride = max(1, file.stat().st_size // max(1, len(lines.readline())) // _MAX_SAMPLES)
        lines.seek(0)
        for index, line in enumerate(lines):
            if index % stride:
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and number(row.get("unix_s")) is not None:
                yield row


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Values by title, not a number where a sample has none; the host's only where there is no GPU."""
    lists = [row["gpus"] if isinstance(row.get("gpus"), list) else [] for row in rows]
    gpus = [[gpu for gpu in found if isinstance(gpu, dict)] for found in lists]
    if any(gpus):
        return {
            "GPU utilisation, % (mean)": [_over(sample, "util", np.mean) for sample in gpus],
            "GPU power, W (all)": [_over(sample, "power_w", np.sum) for sample in gpus],
            "GPU memory, GB (largest)": [_over(sample, "mem_bytes", np.max) / 1e9 for sample in gpus],
        }
    hosts = [[row["host"]] if isinstance(row.get("host"), dict) else [] for row in rows]
    return {
        "CPU utilisation, %": [_over(host, "cpu_util", np.mean) for host in hosts],
        "Memory of our processes, GB": [_over(host, "rss_bytes", np.sum) / 1e9 for host in hosts],
    }


def _over(readings: Sequence[Mapping[str, Any]], name: str, join: Any) -> float:
    values = [value for reading in readings if (value := number(reading.get(name))) is not None]
    return float(join(values)) if values else float("nan")


def _phase_spans(seconds: Floats, phases: Sequence[str]) -> list[tuple[float, float, str]]:
    """(begin, end, phase) of the stretches in which most samples of a bin are of one phase."""
    spans: list[tuple[float, float, str]] = []
    usual = float(np.median(np.diff(seconds)))
    for chunk in np.array_split(np.arange(len(phases)), min(_BINS, len(phases))):
        phase = Counter(phases[i] for i in chunk).most_common(1)[0][0]
        begin, last = float(seconds[chunk[0]]), float(seconds[chunk[-1]])
        after = float(seconds[min(chunk[-1] + 1, len(phases) - 1)])
        end = after if after - last <= _GAP * usual else last
        if spans and spans[-1][1:] == (begin, phase):
            spans[-1] = (spans[-1][0], end, phase)
        else:
            spans.append((begin, end, phase))
    return [span for span in spans if span[2] in PHASES]


def _chart(times: Floats, values: Floats, phases: Sequence[tuple[float, float, str]]) -> str:
    seconds = times - times[0]
    gaps = np.flatnonzero(np.diff(seconds) > _GAP * np.median(np.diff(seconds))) + 1
    figure, axes = new_figure(3.5, 1.4)
    for begin, end, phase in phases:
        axes.axvspan(begin / 60, end / 60, color=_COLOURS[phase], alpha=0.22, linewidth=0)
    axes.plot(np.insert(seconds, gaps, np.nan) / 60, np.insert(values, gaps, np.nan), color=BLUE, linewidth=1.1)
    axes.set_xlim(0, max(seconds[-1] / 60, 1e-3))
    axes.set_ylim(bottom=0)
    return svg_text(figure)
