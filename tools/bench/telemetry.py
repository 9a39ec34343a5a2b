"""What telemetry costs: steps that are watched against steps that only write their metrics.

Two data-parallel ranks take GRPO updates of the tiny model, in blocks that are watched and not, by turns and in the
same processes. Watched (ours): the node's samples five times as often as by default, an endpoint for Prometheus that
somebody scrapes every second, and a trace of one step of each block. Not watched (peer): `telemetry.sample_s=0`, no
endpoint, no trace. Both write metrics.jsonl and TensorBoard. The ratio is below 1 by what telemetry costs: `step` in
time, `cpu` in the first rank's seconds of CPU, which other programs of the machine disturb less.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.bench import common

CASES = ("step", "cpu")
RANKS, STEPS = 2, 5
SAMPLE_S = 1.0


def main() -> None:
    """Measure both cases, in one run."""
    parser = common.parser(__doc__, CASES)
    parser.add_argument("--rank-of", metavar="FOLDER", help=argparse.SUPPRESS)  # be a rank
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help="of a block (default: %(default)s)")
    args = parser.parse_args()
    if args.rank_of:
        be_a_rank(Path(args.rank_of), args.pairs, args.steps)
        return
    common.finish("telemetry", measure(args), args)


def measure(args: Any) -> list[common.Case]:
    """Let two ranks take turns, and return the figures."""
    found = common.by_ranks(__file__, RANKS, ["--pairs", str(args.pairs), "--steps", str(args.steps)])
    setting = (
        f"update of 8 prompts x 8 completions of 64 tokens on average, {RANKS} data-parallel ranks x 1 thread, blocks "
        f"of {args.steps} steps; ours sampled every {SAMPLE_S:g} s, scraped every second, one step of a block traced; "
        "95 % interval of the median ratio "
    )
    units = {"step": "s", "cpu": "CPU s"}
    return [
        common.case(name, found[name], units[name], setting + interval(found[name]), more_is_better=False)
        for name in common.chosen(args, CASES)
    ]


def interval(pairs: list[list[float]]) -> str:
    """Return the middle 95 % of the medians of 2,000 resamples of the pairs' ratios (percentile bootstrap)."""
    ratios = np.array([peer / ours for ours, peer in pairs])
    drawn = np.random.default_rng(0).integers(0, len(ratios), (2000, len(ratios)))
    low, high = np.percentile(np.median(ratios[drawn], axis=1), [2.5, 97.5])
    return f"{low:.4f} to {high:.4f}"


def be_a_rank(folder: Path, pairs: int, steps: int) -> None:
    """Take blocks of steps by turns; rank 0 writes the times."""
    from tools.bench import tiny, update

    with tiny.mesh(1) as mesh:
        import torch.distributed as dist

        if mesh.rank == 0:
            tiny.write_model(folder / "model")
        dist.barrier()
        prompts = tiny.prompts(folder / "model", 8, 224)
        groups = update.random_groups(prompts, tiny.long_tailed_lengths(64).reshape(8, 8))
        trained = update.build(folder / "model", mesh, 0.0, False)
        step = update.step(trained, groups[mesh.dp_rank :: mesh.dp_size], update.LEARNING_RATE)
        spent: tuple[list[float], list[float]] = ([], [])
        sides = (blocks(folder, mesh.rank, step, steps, on, spent[not on]) for on in (True, False))
        found = common.alternate(*sides, pairs)
        if mesh.rank == 0:
            cpu = list(zip(spent[0][1:], spent[1][1:], strict=True))  # without the turns that warm up
            (folder / common.RESULT).write_text(json.dumps({"step": found, "cpu": cpu}))


def blocks(
    folder: Path, rank: int, step: Callable[[], object], steps: int, watched: bool, spent: list[float]
) -> Callable[[], float]:
    """Return a measurement of a block of steps as the loops take them, in seconds a step; CPU seconds go to `spent`."""
    from megatron_vlmr1.config import Config
    from megatron_vlmr1.telemetry.metrics import MetricsWriter
    from megatron_vlmr1.telemetry.progress import here
    from megatron_vlmr1.telemetry.prometheus import PrometheusEndpoint
    from megatron_vlmr1.telemetry.timers import PhaseTimers
    from megatron_vlmr1.train.watch import Watch

    run_dir = folder / ("watched" if watched else "plain")
    telemetry = {"sample_s": SAMPLE_S if watched else 0, "trace_steps": [steps // 2] if watched else []}
    cfg = Config.model_validate(
        {"model": {"path": ""}, "data": {"train": ""}, "run_dir": str(run_dir), "telemetry": telemetry}
    )

    def measured() -> float:
        run_dir.mkdir(exist_ok=True)
        with ExitStack() as stack:
            timers = PhaseTimers()
            watch = Watch(cfg, rank, timers, stack)
            endpoint = PrometheusEndpoint("127.0.0.1", 0, "bench") if watched and rank == 0 else None
            writer = MetricsWriter(run_dir, prometheus=endpoint) if rank == 0 else None
            if writer is not None:
                stack.callback(writer.close)
            if endpoint is not None:
                stack.enter_context(scraped(f"http://127.0.0.1:{endpoint.port}/metrics"))
            step()
            timers.take()
            begun, cpu = time.perf_counter(), time.process_time()
            for number in range(steps):
                here.step = number
                watch.begin(number)
                with timers("update"):
                    step()
                metrics = timers.take() | watch.end(number)
                if writer is not None:
                    writer.write(number, metrics)
            spent.append((time.process_time() - cpu) / steps)
            return (time.perf_counter() - begun) / steps

    return measured


@contextmanager
def scraped(url: str) -> Iterator[None]:
    """Let a thread read the endpoint every second, as Prometheus would do from elsewhere."""
    ended = threading.Event()

    def scrape() -> None:
        while not ended.wait(1.0):
            with urllib.request.urlopen(url) as answer:  # noqa: S310 - our own endpoint
                answer.read()

    thread = threading.Thread(target=scrape, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
