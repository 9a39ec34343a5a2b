"""The rows of the matrix: killed processes, signals, bad numbers. Each returns what it measured."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_vlmr1.drill import digests
from megatron_vlmr1.drill.faults import Fault
from megatron_vlmr1.drill.field import RANKS, STEPS, Field
from megatron_vlmr1.drill.jobs import Ended, need, run, start, succeed
from megatron_vlmr1.errors import DONE, REQUEUE, STOPPED
from megatron_vlmr1.telemetry.metrics import read_metrics

_OUT_S = 5.0
_REPEATS = 5


@dataclass(frozen=True)
class Row:
    """One row of the matrix.

    Attributes:
        name: as ``--row`` takes it.
        fault: what goes wrong.
        figure: what must be true.
        measure: runs it and returns what was found; raises `Missed` where the figure is not met.
        short: whether it is part of the short form.
    """

    name: str
    fault: str
    figure: str
    measure: Callable[[Field], str]
    short: bool = False


def kill_in(point: str) -> Callable[[Field], str]:
    """Return the row that kills the second rank in the fourth step, then resumes."""

    def measure(field: Field) -> str:
        expected = digests.state(field.whole, STEPS)
        name = f"kill_{point}"
        config = field.config(name, train={"async_save": False})  # so that step 2 is there
        ended = run(config, RANKS, Fault(1, 3, point, "kill"))
        need(ended.code not in (DONE, REQUEUE, STOPPED), f"exit code {ended.code} after a kill")
        need("rank 1" in ended.output and "SIGKILL" in ended.output, f"nobody says who was killed: {ended.last_words}")
        times = _all_out(ended)
        _resume(config, field.root / name, 2)
        return f"exit {ended.code}, {times}; resumed: {digests.same(digests.state(field.root / name, STEPS), expected)}"

    return measure


def kill_launcher(field: Field) -> str:
    """Kill the launcher while its ranks train."""
    with start(field.config("kill_launcher", train={"steps": 500}), RANKS) as job:
        job.wait_for("checkpoint of step 2")
        many = len(job.alive())
        need(many >= 1 + RANKS + 2 + RANKS, f"only {many} processes: launcher, ranks, rewards, data workers")
        ended = job.kill_launcher()
    need(ended.emptied_s <= _OUT_S, f"the last of {many} processes left after {ended.emptied_s:.1f} s")
    return f"{many} processes gone after {ended.emptied_s:.1f} s"


def sigterm(field: Field) -> str:
    """Five times: SIGTERM to the launcher's ranks at a drawn step and point, then resume."""
    expected = digests.state(field.whole, STEPS)
    draw = random.Random(7)  # noqa: S311 - which steps are tried
    places = []
    for i in range(_REPEATS):
        step, point = draw.randrange(STEPS - 1), draw.choice(("rollout", "reward", "forward", "optimizer"))
        name = f"sigterm_{i}"
        config = field.config(name, train={"save_every": 0})
        faults = [Fault(rank, step, point, f"signal:{signal.SIGTERM.value}") for rank in range(RANKS)]
        run(config, RANKS, faults).expect(REQUEUE)
        _only_checkpoint(field.root / name, step + 1)
        _resume(config, field.root / name, step + 1)
        digests.same(digests.state(field.root / name, STEPS), expected)
        places.append(f"{step} in {point}")
    return f"{_REPEATS}/{_REPEATS} with {len(expected)} identical digests each, at steps {', '.join(places)}"


def one_rank_signalled(field: Field) -> str:
    """SIGUSR1 to the second rank only."""
    config = field.config("sigusr1", train={"save_every": 0})
    fault = Fault(1, 1, "rollout", f"signal:{signal.SIGUSR1.value}")
    run(config, RANKS, fault).expect(REQUEUE)
    _only_checkpoint(field.root / "sigusr1", 2)
    found, expected = digests.state(field.root / "sigusr1", 2), digests.state(field.whole, 2)
    return f"exit {REQUEUE}, step 2 saved by all; {digests.same(found, expected)}"


def bad_numbers(field: Field) -> str:
    """NaN in one rank's loss, in the other's gradient, then in three steps in a row."""
    bad = {1: (1, "loss"), 3: (0, "gradient"), 5: (1, "loss"), 6: (0, "gradient"), 7: (1, "gradient")}
    faults = [Fault(rank, step, point, "nan") for step, (rank, point) in bad.items()]
    run(field.config("nan", train={"steps": 12, "save_every": 1}), RANKS, faults).expect(STOPPED)
    run_dir = field.root / "nan"
    skipped = [step for step, row in read_metrics(run_dir) if row["train/skipped"]]
    need(skipped == [1, 3, 5, 6], f"steps {skipped} were skipped instead of 1, 3, 5, 6")
    for step in skipped:
        before, after = (digests.state(run_dir, n) for n in (step, step + 1))
        for what in ("parameters", "optimizer"):
            need(before[what] == after[what], f"{what} changed in step {step}, which was skipped")
    before, after = (digests.state(run_dir, n) for n in (4, 5))
    for what in ("parameters", "optimizer"):
        need(before[what] != after[what], f"{what} does not change in a good step either")
    return f"skipped by all: steps 1, 3, 5, 6, parameters and optimizer unchanged; the third in a row: exit {STOPPED}"


def _resume(config: Path, run_dir: Path, step: int) -> None:
    """Go on to the end from the checkpoint of `step`: from the beginning the same would come of it."""
    ended = succeed(config, RANKS)
    source = digests.checkpoint_path(run_dir, step)
    need(f"resuming from {source}\n" in ended.output, f"it did not go on from {source}: {ended.last_words}")


def _all_out(ended: Ended) -> str:
    need(ended.survived_s <= _OUT_S, f"the last rank left {ended.survived_s:.1f} s after the kill")
    need(ended.emptied_s <= _OUT_S, f"the last process left {ended.emptied_s:.1f} s after the kill")
    return f"ranks out after {ended.survived_s:.1f} s, 0 processes after {ended.emptied_s:.1f} s"


def _only_checkpoint(run_dir: Path, step: int) -> None:
    found = sorted(path.name for path in (run_dir / "checkpoints").glob("step_*"))
    need(found == [f"step_{step}"], f"checkpoints {found} instead of step_{step}")
