"""The planner's predicted peaks of memory against measured ones, phase by phase and rank by rank.

`python tools/bench/plan_memory.py [--case NAME] [--json] [--write]` runs GRPO steps of random models on gloo ranks of
this machine: rollout, log-probs of old and reference, update, save, at exactly the lengths and images that the plan
counts. Measured are the bytes of all torch storages that are alive (`tools/bench/storages.py`), the host's (reference,
staged save) apart; resident memory stands beside it. `--explain` says what was alive at each peak.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rich.console import Console
from rich.table import Table

from megatron_vlmr1.plan.memory import PHASES, RankMemory
from tools.bench import common
from tools.bench.memory_cases import CASES, LIMIT_S, predicted

TOLERANCE = 0.10
HELD = ("weights", "gradients", "optimizer")
HOST = ("reference", "offloaded optimizer", "staged save", "last save")
HEADINGS = ("case", "stage", "phase", "predicted", "measured", "error", "coming and going", "resident")


def main() -> int:
    """Measure the cases that were asked for; 1 where a prediction is more than a tenth off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout, all else on stderr")
    parser.add_argument("--case", choices=tuple(CASES), action="append", metavar="NAME", help=f"of {', '.join(CASES)}")
    parser.add_argument("--explain", action="store_true", help="say what was alive at each peak")
    parser.add_argument("--write", action="store_true", help="write docs/results/plan_memory.md")
    parser.add_argument("--be-a-rank", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.be_a_rank:
        from tools.bench.memory_step import be_a_rank

        be_a_rank(CASES[args.case[0]], args.be_a_rank, args.explain)
        return 0
    rows = [row for name in args.case or CASES for row in run_case(name, args)]
    Console(stderr=args.json, width=None if sys.stdout.isatty() else 140).print(table(rows))
    if args.write:
        (common.RESULTS / "plan_memory.md").write_text(markdown(rows))
    if args.json:
        print(json.dumps(rows))
    return int(any(abs(row["error"]) > TOLERANCE for row in rows))


def run_case(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Start the ranks of a case, and return its rows."""
    world = CASES[name].world
    with tempfile.TemporaryDirectory(prefix="vlmr1-plan-") as folder:
        env = {**os.environ, "PYTHONPATH": str(common.ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        env |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
        env["VLMR1_INIT_METHOD"] = (Path(folder) / "rendezvous").as_uri()
        words = [sys.executable, __file__, "--case", name, "--be-a-rank", folder, *(["--explain"] * args.explain)]
        logs = [(Path(folder) / f"rank_{rank}.log").open("w+") for rank in range(world)]
        jobs = [
            subprocess.Popen(words, env={**env, "RANK": str(r), "LOCAL_RANK": str(r)}, stdout=log, stderr=log)  # noqa: S603 - our own
            for r, log in enumerate(logs)
        ]
        deadline = time.monotonic() + LIMIT_S
        while any(job.poll() is None for job in jobs) and not any(job.poll() for job in jobs):
            if time.monotonic() > deadline:
                break
            time.sleep(0.2)
        for job in jobs:
            job.kill()
        if any(job.wait() for job in jobs):
            texts = [Path(log.name).read_text()[-3000:] for log in logs]
            raise SystemExit(f"{name}: {[job.returncode for job in jobs]}\n" + "\n".join(texts))
        if args.explain:
            print(*(Path(log.name).read_text() for log in logs), sep="\n", file=sys.stderr)
        found = [json.loads((Path(folder) / f"rank_{rank}.json").read_text()) for rank in range(world)]
        return compared(name, predicted(CASES[name], Path(folder)), found)


def compared(name: str, expected: Sequence[RankMemory], found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each phase and pipeline stage: its dearest rank, predicted and measured.

    ``beyond`` is how far a prediction is off in what comes and goes: less weights, gradients and optimizer state.
    """
    rows = []
    for stage, memory in enumerate(expected):
        ranks = [each for each in found if each["stage"] == stage]
        held = sum(memory.phases["save"][part] for part in HELD)
        for phase in PHASES:
            measured = max(each["peaks"][phase] for each in ranks)
            resident = max(each["rss"][phase] for each in ranks)
            rows.append(_row(name, stage, phase, memory.peak(phase), measured, resident, held))
        for part in HOST:
            if part in memory.host:
                measured = max(each["host"][part] for each in ranks)
                rows.append(_row(name, stage, f"host: {part}", memory.host[part], measured, None, None))
    return rows


def _row(
    case: str, stage: int, phase: str, expected: int, measured: int, resident: float | None, held: int | None
) -> dict[str, Any]:
    return {
        **dict(case=case, stage=stage, phase=phase, predicted=expected, measured=measured),
        "error": expected / measured - 1,
        "beyond": None if held is None else expected - measured,
        "held": held,
        "resident": resident,
    }


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the rows as a table, in MB."""
    out = Table(title="peaks of memory, MB")
    for i, heading in enumerate(HEADINGS):
        out.add_column(heading, justify="left" if i in (0, 2) else "right")
    for row in rows:
        out.add_row(*_cells(row))
    return out


def _cells(row: dict[str, Any]) -> list[str]:
    held, resident = row["held"], row["resident"]
    figures = [f"{row[key] / 1e6:.2f}" for key in ("predicted", "measured")]
    coming = "" if held is None else f"{(row['measured'] - held) / 1e6:.2f}"
    return [
        *(row["case"], str(row["stage"]), row["phase"], *figures, f"{row['error']:+.1%}", coming),
        "" if resident is None else f"{resident / 1e6:.0f}",
    ]


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return the results page."""
    phases = [row for row in rows if row["phase"] in PHASES]
    worst = max(phases, key=lambda row: abs(row["error"]))
    mean = sum(abs(row["error"]) for row in phases) / len(phases)
    lines = [
        "# Predicted and measured memory",
        "",
        "`python tools/bench/plan_memory.py --write` measures this anew: two GRPO steps of random models on gloo ranks "
        'of one machine, the second one\'s peaks. Predicted is `plan.memory.rank_memory(..., device="cpu")` from the '
        "config alone. Measured are the bytes of all torch storages alive, the dearest rank of each pipeline stage; "
        "what kernels take and give back within themselves is not seen. *coming and going* is the measured peak less "
        "weights, gradients and optimizer state, which are predicted to the byte (but for padding). *resident* is the "
        "process's own peak above what it had before the model was made (VmHWM), host memory, allocator and libraries "
        "included. MB are 10^6 bytes. The models: `tiny`, the shipped 1.2 M; `vocabulary`, 5.7 M with 40,000 tokens; "
        "`100m`, 101 M. `long` has images of 40 x 44 patches in prompts of 640 tokens and completions of 128. Nothing "
        "here was measured on a GPU.",
        "",
        f"Largest error of a phase's peak: {worst['error']:+.1%} ({worst['case']}, stage {worst['stage']}, "
        f"{worst['phase']}); mean of the absolute errors over {len(phases)} peaks: {mean:.1%}.",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
        *("| " + " | ".join(_cells(row)) + " |" for row in rows),
        "",
        f"Measured on {common.machine()}; {', '.join(f'{k} {v}' for k, v in common.versions().items())}.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
