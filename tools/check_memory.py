"""Whether resident memory is flat over a run: GRPO of the shipped tiny model, measured after each step.

`python tools/check_memory.py [--steps 300] [--nproc 2] [--json]` fails where a process grows by more than 50 KB a step.
Looked at are the ranks, the reward service and its workers, from outside. The slope is the median of the slopes of all
pairs of steps (Theil-Sen) after the warm-up, so that a single jump does not count as a leak. The allocator is told to
give back what is freed: its own fragments come and go by tens of MB, after saves above all, and would hide a leak.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil
from rich.console import Console
from rich.table import Table

from megatron_vlmr1.cli.main import main as vlmr1
from megatron_vlmr1.data.scenes import write_split
from megatron_vlmr1.telemetry.metrics import read_metrics

MAX_SLOPE_KB = 50.0
WARM_UP = 1 / 3  # of the steps, in which caches and arenas of the allocators fill
PROMPTS = 32
_POLL_S = 0.02
_SETTINGS = {
    "precision": "fp32",
    "optimizer.lr": 1e-6,
    "rollout.num_generations": 4,
    "rollout.max_new_tokens": 30,
    "train.prompts_per_step": 4,
    "train.save_every": 10,
    "train.sample_every": 1,
    "parallel.timeout_s": 120,
    "rewards.workers": 1,
}

_GIVE_BACK = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # glibc's

Series = dict[str, list[tuple[int, float]]]  # process -> (step, resident KB)


def main(words: Sequence[str] | None = None) -> int:
    """Train, measure, print; 1 where something grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--nproc", type=int, default=2, help="data-parallel ranks")
    parser.add_argument("--json", action="store_true", help="one JSON object a process")
    parser.add_argument("--series", type=Path, help="write what was measured to this file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the config")
    args = parser.parse_args(words)
    with tempfile.TemporaryDirectory(prefix="vlmr1-memory-") as folder:
        series = measure(Path(folder), args.steps, args.nproc, args.overrides)
    if args.series:
        args.series.write_text(json.dumps(series))
    rows = [row(name, points, args.steps) for name, points in sorted(series.items())]
    if args.json:
        for each in rows:
            print(json.dumps(each))
    else:
        table = Table("process", "steps", "first MB", "last MB", "KB a step", "")
        for each in rows:
            verdict = "" if each["flat"] else "grows"
            figures = (f"{each[key]:.1f}" for key in ("first_mb", "last_mb", "kb_per_step"))
            table.add_row(each["process"], str(each["steps"]), *figures, verdict)
        Console(width=None if sys.stdout.isatty() else 120).print(table)
    return 0 if all(each["flat"] for each in rows) else 1


def row(name: str, points: Sequence[tuple[int, float]], steps: int) -> dict[str, float | str | bool]:
    """Return a process's figures after the warm-up."""
    kept = [point for point in points if point[0] >= steps * WARM_UP]
    slope = theil_sen(kept)
    return {
        "process": name,
        "steps": len(kept),
        "first_mb": round(kept[0][1] / 1024, 3),
        "last_mb": round(kept[-1][1] / 1024, 3),
        "kb_per_step": round(slope, 3),
        "flat": slope <= MAX_SLOPE_KB,
    }


def theil_sen(points: Sequence[tuple[int, float]]) -> float:
    """Return the median slope of all pairs of `points`."""
    pairs = itertools.combinations(points, 2)
    return statistics.median((y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in pairs)


def measure(folder: Path, steps: int, nproc: int, overrides: Sequence[str]) -> Series:
    """Train in `folder`; return the resident memory of every process after every step."""
    jsonl = write_split(folder / "scenes", "train", PROMPTS)
    images = str(folder / "scenes" / "images")
    if vlmr1(["shards", "build", str(folder / "data"), "--jsonl", str(jsonl), "--images", images]):
        raise SystemExit("the data could not be built")
    run_dir, config = folder / "run", folder / "config.yaml"
    config.write_text("method: grpo\nmodel: {path: 'asset:tiny_vlm'}\n" + f"data: {{train: {folder / 'data'}}}\n")
    settings = {**_SETTINGS, "run_dir": run_dir, "train.steps": steps}
    command = [sys.executable, "-m", "megatron_vlmr1.cli", "train", str(config), "--nproc", str(nproc)]
    command += [*(f"{key}={value}" for key, value in settings.items()), *overrides]
    series: Series = {}
    log = folder / "log"
    env = {**os.environ, **_GIVE_BACK}
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out, env=env) as job:  # noqa: S603 - our own
        names: dict[int, str] = {}
        seen = -1
        while job.poll() is None:
            rows = read_metrics(run_dir)
            if rows and rows[-1][0] > seen:
                seen = rows[-1][0]
                for process in psutil.Process(job.pid).children(recursive=True):
                    look(process, seen, names, series)
            time.sleep(_POLL_S)
    if job.returncode:
        raise SystemExit(f"training left with exit code {job.returncode}\n{log.read_text()[-3000:]}")
    kept = {name: points for name, points in series.items() if points[-1][0] >= steps * WARM_UP + 2}
    missing = {*(f"rank {i}" for i in range(nproc)), "reward service"} - {name.rpartition(" (")[0] for name in kept}
    if missing:
        raise SystemExit(f"not measured: {', '.join(sorted(missing))}")
    return kept


def look(process: psutil.Process, step: int, names: dict[int, str], series: Series) -> None:
    """Add a process's resident memory to its series; one that has just gone is left out."""
    try:
        if process.pid not in names:
            names[process.pid] = name_of(process)
        if names[process.pid]:
            points = series.setdefault(f"{names[process.pid]} ({process.pid})", [])
            points.append((step, process.memory_info().rss / 1024))
    except psutil.Error:
        return


def name_of(process: psutil.Process) -> str:
    """Return what a process does in the run; nothing for one that does not count."""
    line = " ".join(process.cmdline())
    if "megatron_vlmr1.cli train" in line:
        return f"rank {process.environ()['RANK']}"
    if "rewards.server" in line:
        return "reward service"
    return "reward worker" if "spawn_main" in line else ""


if __name__ == "__main__":
    sys.exit(main())
