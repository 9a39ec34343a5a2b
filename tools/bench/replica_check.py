"""What the checks of copies and optimizer state cost: steps with `train.replica_check_every` 1 against 0.

`step` is a GRPO update on two data-parallel ranks of the tiny model: each check compares parameters over the ranks and
masters and moments with what the last step left; a step has two checks and takes the checksums once. `checksum` is
the checksum alone of 64 MB against one sum over the same bytes, about the least that reading them takes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.bench import common

CASES = ("step", "checksum")
RANKS, STEPS = 2, 5
MEGABYTES = 64


def main() -> None:
    """Measure the cases that were asked for."""
    parser = common.parser(__doc__, CASES)
    parser.add_argument("--rank-of", metavar="FOLDER", help=argparse.SUPPRESS)  # be a rank of the case `step`
    args = parser.parse_args()
    if args.rank_of:
        be_a_rank(Path(args.rank_of), args.pairs)
        return
    measures = {"step": steps, "checksum": checksum}
    common.finish("replica_check", [measures[name](args) for name in common.chosen(args, CASES)], args)


def steps(args: Any) -> common.Case:
    """Time steps with and without, in the same processes by turns."""
    found = common.by_ranks(__file__, RANKS, ["--pairs", str(args.pairs)])
    setting = (
        f"update of 8 prompts x 8 completions of 64 tokens on average, {found['parameters']:,} parameters, fp32, "
        f"{RANKS} data-parallel ranks x 1 thread; ours with two checks a step, peer without"
    )
    return common.case("step", found["pairs"], "s", setting, more_is_better=False)


def be_a_rank(folder: Path, pairs: int) -> None:
    """Take steps by turns; rank 0 writes the times."""
    from tools.bench import tiny, update

    with tiny.mesh(1) as mesh:
        import torch.distributed as dist

        if mesh.rank == 0:
            tiny.write_model(folder / "model")
        dist.barrier()
        prompts = tiny.prompts(folder / "model", 8, 224)
        groups = update.random_groups(prompts, tiny.long_tailed_lengths(64).reshape(8, 8))
        trained = update.build(folder / "model", mesh, 0.0, False)
        mine = groups[mesh.dp_rank :: mesh.dp_size]
        sides = (timed(trained, mine, every) for every in (1, 0))
        found = common.alternate(*sides, pairs)
        if mesh.rank == 0:
            count = sum(p.numel() for p in trained.updater.policy.parameters())
            (folder / common.RESULT).write_text(json.dumps({"pairs": found, "parameters": count}))


def timed(trained: Any, groups: Any, every: int) -> Callable[[], float]:
    """Return a measurement of steps that are checked every so many steps; seconds a step."""
    from megatron_vlmr1.parallel.replicas import Replicas
    from tools.bench import update

    def measure() -> float:
        updater = trained.updater
        updater.replicas = Replicas(updater.policy.chunks, updater.optimizer, updater.policy.mesh, every)
        step = update.step(trained, groups, update.LEARNING_RATE)
        step()
        start = time.perf_counter()
        for _ in range(STEPS):
            step()
            updater.replicas.check()  # as the loops do after a step
        return (time.perf_counter() - start) / STEPS

    return measure


def checksum(args: Any) -> common.Case:
    """Time the checksum of one large tensor in bf16."""
    import torch

    from megatron_vlmr1.parallel.replicas import checksums
    from tools.bench.update import seconds

    torch.set_num_threads(1)
    tensor = torch.randn(MEGABYTES << 19, dtype=torch.bfloat16)
    words = tensor.view(torch.int64)
    sides = (seconds(lambda: checksums([tensor])), seconds(lambda: words.sum()))
    pairs = common.alternate(*sides, args.pairs)
    setting = f"{MEGABYTES} MiB of bf16, 1 thread; peer is one int64 sum, which proves nothing"
    return common.case("checksum", pairs, "s", setting, more_is_better=False)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
