"""The pool of reward processes on a machine that has run out of them."""

from __future__ import annotations

import errno
import os
import signal
import time

import pytest

from megatron_vlmr1.rewards import wire
from megatron_vlmr1.rewards.item import RewardItem
from megatron_vlmr1.rewards.pool import PoolSettings, RewardPool
from megatron_vlmr1.rewards.wire import Result

ITEM = wire.pack([["format"], RewardItem("<think>t</think><answer>a</answer>", "").to_wire()])


def drained(pool: RewardPool, count: int) -> list[Result]:
    results: list[Result] = []
    end = time.monotonic() + 60
    while len(results) < count:
        assert time.monotonic() < end, "waited in vain"
        results += [result for _, result in pool.drain()]
        time.sleep(0.02)
    return results


def test_a_worker_that_cannot_be_replaced_yet_is_replaced_later(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = RewardPool(PoolSettings(workers=1, deadline_s=5, memory_bytes=1 << 30))
    try:
        pool.submit(0, ITEM)
        assert drained(pool, 1)[0].parts == {"format": 1.0}
        (pid,) = pool.stats()["worker_pids"]  # type: ignore[misc]
        new_lane, refused = pool._new_lane, []

        def scarce() -> object:
            if len(refused) < 3:
                refused.append(1)
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return new_lane()

        monkeypatch.setattr(pool, "_new_lane", scarce)
        os.kill(pid, signal.SIGKILL)
        for ticket in range(5):
            pool.submit(ticket, ITEM)
        assert [result.parts for result in drained(pool, 5)] == [{"format": 1.0}] * 5
        assert len(refused) == 3 and pool.stats()["respawned"] == 1
    finally:
        pool.close()
