"""What the ranks of a job that hangs do before they end: say who hangs, where, and on which lines."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megatron_vlmr1.errors import CRASHED
from megatron_vlmr1.runtime import attempts, hang, heartbeat, stacks
from megatron_vlmr1.runtime.heartbeat import Heartbeat
from megatron_vlmr1.telemetry.files import json_line, readable_text, write_atomic

_POLL_S = 0.1
_LINES = 60  # of a rank's stacks that are printed


def is_begun(log_dir: Path) -> bool:
    """Whether some rank has said that the job hangs; a file system that fails says nothing."""
    return os.path.exists(_folder(log_dir))  # noqa: PTH110 - Path's own raises what is not ENOENT or the like


def report(log_dir: Path, me: Heartbeat, world: int, beat_s: float, still_s: float) -> None:
    """Report together with the other ranks that find the job hanging; return when this process may end.

    The first who comes leads: it learns within two heartbeats who still lives, has the others looked at by a rank of
    their host, and writes ``hang/report.json`` (``{"reason", "blamed", "mute", "ranks"}``) and ``outcome.json``.
    Every rank's stacks are in ``hang/rank_N.txt``.
    """
    folder = _folder(log_dir)
    try:
        folder.mkdir()
        leads = True
    except FileExistsError:
        leads = False
    except OSError:
        leads = True  # nowhere to write: say it, at least
    with suppress(OSError):
        stacks.write_own(_stacks(log_dir, me.rank))
    if leads:
        _lead(log_dir, me, world, beat_s, still_s)
    else:
        _follow(log_dir, me, beat_s)
    sys.stderr.flush()


def _lead(log_dir: Path, me: Heartbeat, world: int, beat_s: float, still_s: float) -> None:
    before = heartbeat.read_all(log_dir)
    _wait(lambda: len(_have_written(log_dir, range(world))) == world, 2 * beat_s + _POLL_S)
    now = [
        replace(me, still_s=max(me.still_s, still_s)) if r.rank == me.rank else r for r in heartbeat.read_all(log_dir)
    ]
    mute = hang.silent(before, now, world) - _have_written(log_dir, range(world)) - {me.rank}
    if mute:
        lookers = _lookers(now, mute, me)
        with suppress(OSError):
            write_atomic(_folder(log_dir) / "mute.json", json_line({"lookers": lookers}))
        _look(log_dir, now, lookers.get(str(me.rank), []))
        _wait(lambda: _have_written(log_dir, mute) >= {r for ranks in lookers.values() for r in ranks}, 2 * beat_s)
        now = [_as_seen(log_dir, record) if record.rank in mute else record for record in now]
    blamed = hang.culprits(now, mute)
    states = {rank: _first_line(_stacks(log_dir, rank)) or "none of its host answers" for rank in mute}
    reason = hang.verdict({record.rank: record for record in now}, blamed, states, still_s)
    step = max((record.step for record in now if record.step is not None), default=None)
    row = {"reason": reason, "blamed": blamed, "mute": sorted(mute), "ranks": [asdict(record) for record in now]}
    with suppress(OSError):  # the outcome first: who reads the report leaves, and srun may then kill this rank
        if not (log_dir / attempts.OUTCOME).exists():
            attempts.write_outcome(log_dir, f"the job hangs: {reason}", CRASHED, step)
        write_atomic(_folder(log_dir) / "report.json", json_line(row))
    print(f"vlmr1: error: the job hangs: {reason}; stacks of all ranks: {_folder(log_dir)}", file=sys.stderr)
    for rank in blamed[:3]:
        print(f"stacks of rank {rank}:\n{_head(_stacks(log_dir, rank))}", file=sys.stderr)


def _follow(log_dir: Path, me: Heartbeat, beat_s: float) -> None:
    """Look at the silent ranks of this host if asked to, until the report is there or its writer is lost."""
    looked = False

    def told() -> bool:
        nonlocal looked
        asked = _read(_folder(log_dir) / "mute.json")
        if asked and not looked:
            looked = True
            _look(log_dir, heartbeat.read_all(log_dir), asked["lookers"].get(str(me.rank), []))
        return (_folder(log_dir) / "report.json").exists()

    _wait(told, 10 + 6 * beat_s)
    reason = _read(_folder(log_dir) / "report.json").get("reason", "its report is missing")
    print(f"vlmr1: rank {me.rank} ends because the job hangs: {reason}", file=sys.stderr)


def _lookers(records: Collection[Heartbeat], mute: Collection[int], me: Heartbeat) -> dict[str, list[int]]:
    """Return which live rank looks at which silent ones: one for each host that has any."""
    out: dict[str, list[int]] = {}
    for lost in (record for record in records if record.rank in mute):
        able = [r.rank for r in records if r.host == lost.host and r.rank not in mute and not r.left]
        if able:
            looker = me.rank if lost.host == me.host else min(able)
            out.setdefault(str(looker), []).append(lost.rank)
    return out


def _look(log_dir: Path, records: Collection[Heartbeat], ranks: Collection[int]) -> None:
    for record in (record for record in records if record.rank in ranks):
        dump = heartbeat.path(log_dir, record.rank).with_suffix(".stacks")  # if only Python was kept from running
        with suppress(OSError):
            text = stacks.of_other(record.pid) + readable_text(dump)
            write_atomic(_stacks(log_dir, record.rank), text.encode())


def _as_seen(log_dir: Path, record: Heartbeat) -> Heartbeat:
    """Return the record of a silent rank with where it is now, where somebody could look."""
    step, phase, at = stacks.shown(readable_text(_stacks(log_dir, record.rank)))
    return replace(record, step=record.step if step is None else step, phase=phase or record.phase, at=at or record.at)


def _have_written(log_dir: Path, ranks: Collection[int]) -> set[int]:
    names = {path.name for path in _folder(log_dir).glob("rank_*.txt")}
    return {rank for rank in ranks if _stacks(log_dir, rank).name in names}


def _wait(done: Callable[[], bool], longest_s: float) -> None:
    end = time.monotonic() + longest_s
    while not done() and time.monotonic() < end:
        time.sleep(_POLL_S)


def _folder(log_dir: Path) -> Path:
    return log_dir / "hang"


def _stacks(log_dir: Path, rank: int) -> Path:
    return _folder(log_dir) / f"rank_{rank}.txt"


def _read(path: Path) -> Mapping[str, Any]:
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError):
        return {}


def _first_line(path: Path) -> str:
    return readable_text(path).partition("\n")[0]


def _head(path: Path) -> str:
    return "\n".join(readable_text(path).splitlines()[:_LINES])
