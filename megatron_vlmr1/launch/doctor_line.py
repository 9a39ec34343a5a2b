"""One line of what `vlmr1 doctor` says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "missing", "bad"]


@dataclass(frozen=True)
class Line:
    """One thing that was looked at.

    Attributes:
        name: of the thing.
        state: ok; missing: something does without it; bad: nothing will run as it should.
        found: what is there.
        do: what to do about it, "" where all is well.
    """

    name: str
    state: State
    found: str
    do: str = ""


def all_well(lines: Sequence[Line]) -> bool:
    """Whether nothing is bad."""
    return all(line.state != "bad" for line in lines)
