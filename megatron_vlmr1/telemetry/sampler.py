"""Reads a node's GPUs and host every few seconds, in a thread beside the training.

Each sample is a line of ``run_dir/telemetry/node_NAME.jsonl`` with the step and phase it fell into, and counts in the
metrics of that step.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_vlmr1.telemetry import host, nvml
from megatron_vlmr1.telemetry.files import json_line
from megatron_vlmr1.telemetry.lines import LineFile
from megatron_vlmr1.telemetry.progress import here

log = logging.getLogger(__name__)

_KEPT = 10_000  # samples of one step
_STALE = 10  # periods after which the last sample tells nothing of now
_FIRST_S = 0.1  # that the thread waits to measure its first utilisation; a step would wait for nothing
_LEAVE_S = 2.0  # for the thread to finish a reading

Sample = dict[str, Any]


def node_file(run_dir: str | Path, node: str) -> Path:
    """Return where the samples of a node go."""
    return Path(run_dir) / "telemetry" / f"node_{re.sub(r'[^0-9A-Za-z._-]', '_', node)}.jsonl"


class Sampler:
    """Samples of one node; made on the first rank of each.

    Args:
        run_dir: the run's directory.
        node: the node's name.
        period_s: seconds between two samples; 0 makes none but one for each call of `take`, and no file.
    """

    def __init__(self, run_dir: Path, node: str, period_s: float) -> None:
        self._lines = LineFile(node_file(run_dir, node))
        self._period_s = period_s
        self._host = host.HostReader(run_dir, _FIRST_S if period_s else 0.0)
        self._fresh: deque[Sample] = deque(maxlen=_KEPT)
        self._last: Sample | None = None  # from which rates and energy count
        self._told: Sample | None = None  # the last one of the step before
        self._failed = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="sampler", daemon=True)
        if period_s:
            self._thread.start()

    def take(self) -> list[Sample]:
        """Return the samples since the last call; without one the last, unless the driver has hung for long since."""
        if not self._period_s:
            self.sample()
        taken = [self._fresh.popleft() for _ in range(len(self._fresh))]
        told = self._told
        return taken or ([told] if told and time.time() - told["unix_s"] <= _STALE * self._period_s else [])

    def step_metrics(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Return what `take` gave as metrics of a step; the energy is that used since the last call's samples."""
        if not samples:
            return {}
        metrics = gpu_metrics(samples) | {"host/cpu_util": _mean([s["host"]["cpu_util"] for s in samples])}
        if self._told is not None and (energy := energy_j(self._told, samples[-1])) is not None:
            metrics["gpu/energy_j"] = energy
        self._told = samples[-1]
        return metrics

    def close(self) -> None:
        """End the thread and write what still waits."""
        self._ended.set()
        if self._period_s:
            self._thread.join(_LEAVE_S)
            if not self._thread.is_alive():  # or the disk that it waits for would hold us, too
                self._lines.flush()

    def sample(self) -> None:
        """Read once."""
        step, phase, now = here.step, here.phase, time.time()
        try:
            read: Sample = {"gpus": nvml.read_devices(), "host": self._host.read()}
        except (
            Exception
        ) as error:  # whatever a driver or /proc says is no reason to lose a run, or the samples after it
            if not self._failed:
                log.error("this node cannot be read, and the run goes on without: %s", error)
            self._failed = True
            return
        row = {"unix_s": round(now, 3), "step": step, "phase": phase, **read}
        if self._last is not None:
            _add_rates(row, self._last)
        self._last = row
        self._fresh.append(row)
        if self._period_s:
            gpus = [_kept(gpu) for gpu in row["gpus"]]
            self._lines.append(json_line({**row, "gpus": gpus, "host": _kept(row["host"])}))

    def _work(self) -> None:
        while not self._ended.is_set():
            began = time.monotonic()
            self.sample()
            took = time.monotonic() - began
            self._ended.wait(max(took, self._period_s - took))  # a slow driver gets no more than half of our time


def gpu_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """Return ``gpu/{util,mem_bytes,power_w,temp_c,throttled,lost}`` of the samples of a step on one node.

    Utilisation is the mean over GPUs and samples (percent), power the mean of their sum (watts), memory and
    temperature the largest; throttled: 1 if hardware slowed one down in any sample; lost: GPUs that do not answer.
    """
    rows = [gpu for sample in samples for gpu in sample["gpus"]]
    metrics: dict[str, float] = {}
    if utils := [gpu["util"] for gpu in rows if "util" in gpu]:
        metrics["gpu/util"] = _mean(utils)
    for name in ("mem_bytes", "temp_c"):
        if values := [gpu[name] for gpu in rows if name in gpu]:
            metrics[f"gpu/{name}"] = max(values)
    if powers := [sum(g["power_w"] for g in s["gpus"] if "power_w" in g) for s in samples if _any(s, "power_w")]:
        metrics["gpu/power_w"] = _mean(powers)
    if reasons := [gpu["throttle_reasons"] for gpu in rows if "throttle_reasons" in gpu]:
        metrics["gpu/throttled"] = float(any(map(nvml.is_throttled, reasons)))
    if rows:
        metrics["gpu/lost"] = float(max(sum("lost" in gpu for gpu in s["gpus"]) for s in samples))
    return metrics


def energy_j(before: Mapping[str, Any], after: Mapping[str, Any]) -> float | None:
    """Return the joules that the GPUs of a node used between two samples; None where none of them counts."""
    pairs = zip(before["gpus"], after["gpus"], strict=False)
    spent = [b["energy_j"] - a["energy_j"] for a, b in pairs if "energy_j" in a and "energy_j" in b]
    return sum(spent) if spent else None


def _add_rates(row: Sample, before: Mapping[str, Any]) -> None:
    """Add ``NAME_s``, per second, for whatever counts up; one that began anew is left out."""
    seconds = max(1e-3, row["unix_s"] - before["unix_s"])
    for now, then in [(row["host"], before["host"]), *zip(row["gpus"], before["gpus"], strict=False)]:
        for name in (*host.COUNTERS, *nvml.COUNTERS):
            if name in now and name in then and now[name] >= then[name]:
                now[f"{name}_s"] = round((now[name] - then[name]) / seconds, 1)


def _kept(readings: Mapping[str, float]) -> dict[str, float]:
    """What goes into the file: rates, not what they come from."""
    return {name: value for name, value in readings.items() if name not in (*host.COUNTERS, *nvml.COUNTERS)}


def _any(sample: Mapping[str, Any], name: str) -> bool:
    return any(name in gpu for gpu in sample["gpus"])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
