"""The rows in their order, run one after another, and the table that they make."""

from __future__ import annotations

import difflib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import megatron_vlmr1
from megatron_vlmr1.drill import damage, disk, layouts, operations, rows, watched
from megatron_vlmr1.drill.field import Field
from megatron_vlmr1.drill.jobs import Missed
from megatron_vlmr1.drill.rows import Row

logger = logging.getLogger(__name__)

_KILLED = "survivors out <= 5 s, exit != 0, 0 orphans after 5 s; resumed run's final hashes = uninterrupted"
_DISK = "nothing published, temporary removed, training goes on; next save works once there is room; three in a row: 17"
_FLIP = "found before it is trained on"
_LOGS = "training unaffected (<= 2 % step time)"
ROWS = (
    Row("kill-rollout", "kill -9 a rank in rollout", _KILLED, rows.kill_in("rollout"), short=True),
    Row("kill-forward", "kill -9 a rank in forward", _KILLED, rows.kill_in("forward")),
    Row("kill-all-reduce", "kill -9 a rank in all-reduce", _KILLED, rows.kill_in("all-reduce")),
    Row("kill-optimizer", "kill -9 a rank in optimizer", _KILLED, rows.kill_in("optimizer")),
    Row(
        "sigstop",
        "SIGSTOP a rank",
        "named with phase and stacks <= timeout + 2 s, job ends",
        watched.stopped_rank,
    ),
    Row("kill-launcher", "kill -9 the launcher", "0 orphans <= 5 s", rows.kill_launcher),
    Row(
        "sigterm",
        "SIGTERM at a random step, 5 repeats, same layout",
        "parameters, optimizer, RNG of every rank, sample cursor, rewards: identical bits",
        rows.sigterm,
    ),
    Row("sigusr1", "SIGUSR1 to one rank only", "all save the same step, exit 85", rows.one_rank_signalled, short=True),
    Row(
        "bad-numbers",
        "NaN in loss or gradient on one rank",
        "all ranks agree; hashes unchanged; three in a row: 17",
        rows.bad_numbers,
        short=True,
    ),
    Row(
        "flip-copy", "a bit flipped in one DP replica's parameters right after the gather", _FLIP, watched.flipped_copy
    ),
    Row("flip-master", "a bit flipped in an fp32 master shard", _FLIP, watched.flipped_master),
    Row("disk-full", "disk full (8 MB)", _DISK, disk.full),
    Row("disk-read-only", "read-only directory", _DISK, disk.read_only),
    Row("disk-eio", "EIO on a save", _DISK, disk.input_output_error),
    Row(
        "die-in-save",
        "die at every k-th file operation of a save, k = 1..K",
        "K/K recoverable, previous checkpoint never pruned before publish",
        operations.each,
    ),
    Row(
        "damage",
        "200 bit flips and 50 truncations over every file of a checkpoint",
        "250/250 refused, file named, fallback taken",
        damage.flips_and_cuts,
    ),
    Row("pickles", "hostile pickle in every slot of a checkpoint", "0 executions", damage.hostile_pickles),
    Row(
        "layouts",
        "resume on every ordered pair of layouts with <= 4 ranks",
        "logical tensors bit-equal; next log-probs <= 1e-5, gradient norm <= 1e-5 relative in fp32; same samples",
        layouts.every_pair,
    ),
    Row(
        "layouts-processes",
        "resume on another layout, by another `train`, 6 pairs",
        "same samples; next log-probs <= 1e-5, gradient norm <= 1e-5 relative in fp32",
        layouts.own_processes,
    ),
    Row("wandb", "W&B unreachable", _LOGS, watched.unreachable_wandb),
    Row("full-logs", "full log disk", _LOGS, watched.full_log_disk),
)


@dataclass(frozen=True)
class Result:
    """What a row came to."""

    row: str
    fault: str
    figure: str
    measured: str
    passed: bool
    seconds: float


def chosen(names: Sequence[str], short: bool) -> list[Row]:
    """Return the rows of these names, or those of the short form, or all.

    Raises:
        ValueError: an unknown name; names the nearest.
    """
    known = {row.name: row for row in ROWS}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise ValueError(f"--row {name}: no such row; {hint}")
    return [row for row in ROWS if (row.name in names if names else row.short or not short)]


def run(chosen_rows: Sequence[Row], directory: Path | None, say: Callable[[str], None]) -> list[Result]:
    """Run rows below `directory`, or below a temporary one, which stays if one fails.

    Args:
        chosen_rows: in order.
        directory: empty or new.
        say: told each row as it starts and as it ends.

    Raises:
        ValueError: `directory` is not empty.
    """
    root = directory or Path(tempfile.mkdtemp(prefix="vlmr1-drill-"))
    root.mkdir(parents=True, exist_ok=True)
    if any(root.iterdir()):
        raise ValueError(f"{root}: not empty; name a new directory")
    field = Field(root)
    results = []
    for number, row in enumerate(chosen_rows, start=1):
        say(f"{number}/{len(chosen_rows)} {row.name}: {row.fault}")
        results.append(_result(row, field))
        last = results[-1]
        say(f"{'ok' if last.passed else 'FAILED'} in {last.seconds:.0f} s: {last.measured}")
    if directory is None and all(result.passed for result in results):
        shutil.rmtree(root)
    else:
        say(f"the runs and their logs: {root}")
    return results


def _result(row: Row, field: Field) -> Result:
    begun = time.monotonic()
    try:
        measured, passed = row.measure(field), True
    except Missed as missed:
        measured, passed = " ".join(str(missed).split()), False
    except Exception as error:  # the other rows are worth their minutes
        logger.exception("%s", row.name)
        measured, passed = f"{type(error).__name__}: {' '.join(str(error).split())}", False
    return Result(row.name, row.fault, row.figure, measured, passed, round(time.monotonic() - begun, 1))


def document(results: Sequence[Result]) -> dict[str, object]:
    """Return the table as one JSON document."""
    return {
        "passed": all(result.passed for result in results),
        "commit": commit(),
        "machine": f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}",
        "seconds": round(sum(result.seconds for result in results), 1),
        "rows": [asdict(result) for result in results],
    }


def markdown(results: Sequence[Result]) -> str:
    """Return the table as a page."""
    facts = document(results)
    passed = sum(result.passed for result in results)
    lines = [
        "# The fault matrix",
        "",
        f"`vlmr1 drill` at {facts['commit']} on {facts['machine']}: {passed} of {len(results)} rows met, in "
        f"{facts['seconds']} s.",
        "",
        "| row | fault | figure | measured | met | s |",
        "|---|---|---|---|---|---|",
    ]
    for r in results:
        cells = (r.row, r.fault, r.figure, r.measured, "yes" if r.passed else "**no**", f"{r.seconds:.0f}")
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def commit() -> str:
    """Return the commit of this checkout, marked where it has changes; the version outside one."""
    root = Path(megatron_vlmr1.__file__).parents[1]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--match="]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - a list, of our own
    except FileNotFoundError:
        return f"version {megatron_vlmr1.__version__}"
    return done.stdout.strip() or f"version {megatron_vlmr1.__version__}"
