"""Who is to blame when a job stands still: told from what its ranks last wrote."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from megatron_vlmr1.runtime.heartbeat import Heartbeat


class Stillness:
    """For how long a value has not changed, in the observer's own time.

    An observer that was itself stopped or slow for a while has seen nothing in it: a gap between two looks counts as
    `longest_s` at most.
    """

    def __init__(self, longest_s: float) -> None:
        self._longest_s = longest_s
        self._value: object = None
        self._looked: float | None = None
        self.seconds = 0.0

    def look(self, value: object, now: float) -> float:
        """Return for how many seconds `value` has been the same."""
        if self._looked is None or value != self._value:
            self.seconds = 0.0
        else:
            self.seconds += min(now - self._looked, self._longest_s)
        self._value, self._looked = value, now
        return self.seconds


def silent(before: Sequence[Heartbeat], after: Sequence[Heartbeat], world: int) -> set[int]:
    """Return the ranks that gave no sign of life between two looks, or never did, or left by an exception."""
    then = {record.rank: record.beat for record in before}
    alive = {r.rank for r in after if (r.left and not r.error) or (not r.left and r.beat != then.get(r.rank))}
    return set(range(world)) - alive


def culprits(records: Sequence[Heartbeat], mute: Collection[int]) -> list[int]:
    """Return the ranks that the others wait for, who is to blame most first.

    Those that give no sign of life; else those that are behind all others in the run; else, where some are in a
    collective, those that are not. Nobody where that tells none apart.
    """
    if mute:
        return sorted(mute)
    working = [record for record in records if not record.left]
    last = min((_place(record) for record in working), default=None)
    behind = [record for record in working if _place(record) == last]
    outside = [record for record in behind if not record.waits] or behind
    return sorted(record.rank for record in outside) if len(outside) < len(records) or len(records) == 1 else []


def _place(record: Heartbeat) -> tuple[int, int]:
    return (-1 if record.step is None else record.step, record.phases)


def describe(record: Heartbeat, still_s: float, state: str = "") -> str:
    """Return one line on a rank that hangs; `state` is what the machine says of it where it gives no sign of life."""
    when = "before training" if record.step is None else f"of step {record.step + 1}"
    how = f"no sign of life ({state}); last at" if state else "at"
    return (
        f"rank {record.rank} (pid {record.pid} on {record.host}) hangs in phase {record.phase!r} {when}, "
        f"for {still_s:.0f} s: {how} {record.at or 'an unknown place'}"
    )


def verdict(records: Mapping[int, Heartbeat], blamed: Sequence[int], states: Mapping[int, str], still_s: float) -> str:
    """Return the reason why the job ends, in one line: whom it waits for, and how many wait."""
    if not blamed:
        some = records[min(records)]
        return f"all {len(records)} ranks wait, none is behind: {describe(some, max(some.still_s, still_s))}"
    lines = []
    for rank in blamed[:3]:
        record = records.get(rank, Heartbeat(rank, "?", 0))
        lines.append(describe(record, max(record.still_s, still_s), states.get(rank, "")))
    more = f"; and {len(blamed) - 3} more ranks hang" if len(blamed) > 3 else ""
    return "; ".join(lines) + more
