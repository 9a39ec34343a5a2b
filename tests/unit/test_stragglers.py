"""Which rank is slow in which phase, on tables written by hand."""

from __future__ import annotations

import pytest

from megatron_vlmr1.telemetry.timers import PHASES
from megatron_vlmr1.train.stragglers import Stragglers, own_s, slowest


def row(**seconds: float) -> list[float]:
    return [seconds.get(phase, 1.0) for phase in PHASES]


def test_the_furthest_above_the_others_median():
    found = slowest([row(), row(rollout=3.0), row(update=1.5), row(rollout=1.2)])
    assert (found.rank, found.phase, found.seconds, found.median_s) == (1, "rollout", 3.0, 1.0)
    assert (found.ratio, found.excess_s) == (3.0, 2.0)
    # Where most ranks take long, it is the few who are fast.
    assert slowest([row(), row(rollout=3.0), row(rollout=3.0), row(update=1.5)]).phase == "rollout"
    assert slowest([row(update=0.0), row(update=0.5)]).ratio == pytest.approx(500.0)  # less than 1 ms counts as that


def test_one_line_when_the_same_one_is_slow_for_three_steps_in_a_row(caplog):
    watch = Stragglers(4)
    slow = slowest([row(), row(), row(data=2.0), row()])
    other = slowest([row(), row(update=2.0), row(), row()])
    mild = slowest([row(), row(), row(data=1.4), row()])
    for found in (slow, slow, mild, slow, slow, other, slow, slow):
        watch._tell(found, step_s=7.0)
    assert caplog.text == ""
    for _ in range(4):
        watch._tell(slow, step_s=7.0)
    (said,) = caplog.messages
    assert said == (
        "rank 2 is slow in phase 'data': 2.00 s, 2.0 times the 1.00 s that the other ranks' median takes, for 3 steps "
        "in a row"
    )
    for _ in range(4):
        watch._tell(slow, step_s=100.0)  # a second of a hundred
    assert len(caplog.messages) == 1


def test_who_waits_in_a_collective_is_not_slow_but_rewards_are_waited_for_by_design():
    assert [own_s("rollout", 3.0, waited) for waited in (0.0, 2.0, 3.1)] == [3.0, 1.0, 0.0]
    assert own_s("reward_exposed", 3.0, 2.0) == own_s("save_exposed", 3.0, 0.0) == 3.0


def test_nothing_comes_of_one_rank():
    assert Stragglers(1).compare({"time/rollout": 1.0}, {}, 1.0) == {}
