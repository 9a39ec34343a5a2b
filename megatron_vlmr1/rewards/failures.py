"""Kinds of failures, for counting them: a reason names a reward or quotes a text, so that no two may be alike."""

from __future__ import annotations

KINDS = ("deadline", "worker", "memory", "too_long", "no_answer", "not_judged")
"""Killed at its deadline; the process died or hung; out of memory; text beyond the limit; the service did not answer in
time; the reward function could not judge, raised, or returned no number."""

_SIGNS = (
    ("deadline of ", "deadline"),
    ("worker ", "worker"),
    ("too_long", "too_long"),
    ("no answer from the reward service", "no_answer"),
)


def kind(reason: str) -> str:
    """Return the kind of a failure."""
    for sign, name in _SIGNS:
        if reason.startswith(sign):
            return name
    what = reason.partition(": ")[2]  # behind the reward's name
    if what.startswith("too_long"):
        return "too_long"
    return "memory" if what == "out of memory" else "not_judged"
