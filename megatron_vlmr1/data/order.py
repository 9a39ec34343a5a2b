"""The order of samples: a pure function of (seed, position), the same for every number of ranks.

Position `p` of a run belongs to epoch ``p // N`` of a set of N samples, and to lane ``p % L``. In each epoch the
concatenated index is cut into L lanes: contiguous ranges of N // L or N // L + 1 samples, lane 0 first. The lanes
that own the epoch's last, incomplete round of positions are the longer ones, so every epoch delivers each sample
exactly once and positions never skip a lane. Where L does not divide N these longer lanes change from epoch to epoch
and the cuts between lanes move by less than L samples.

Within a lane the pieces of its shards are permuted, then samples within windows of the resulting sequence. Random
numbers are raw Philox words keyed by sha256: both are specified, so an upgrade of numpy cannot change a run's order.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np

from megatron_vlmr1.types import IntArray


def permutation(n: int, *key: int) -> IntArray:
    """Return a permutation of range(n) that depends on `key` alone."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    words = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(n)
    return np.argsort(words, kind="stable")


class Order:
    """Maps positions to samples, at a bounded cost and memory per lane in use.

    Args:
        firsts: [shards + 1], the first sample of each shard in the concatenated index; the last entry is N.
        seed: seed of all permutations.
        lanes: number of lanes L.
        window: samples within which a lane is shuffled.
    """

    def __init__(self, firsts: IntArray, seed: int, lanes: int, window: int) -> None:
        assert lanes > 0 and window > 0 and firsts[-1] > 0
        self.firsts, self.seed, self.lanes, self.window = firsts, seed, lanes, window
        self.samples = int(firsts[-1])
        # One lane is in one epoch and one window at a time; twice that spans the boundaries.
        self._pieces_of = lru_cache(maxsize=2 * lanes)(self._make_pieces)
        self._window_of = lru_cache(maxsize=2 * lanes)(self._make_window)

    def lane(self, epoch: int, lane: int) -> tuple[int, int]:
        """Return [begin, end) of a lane in the concatenated index."""
        short, longer = divmod(self.samples, self.lanes)
        first = epoch * self.samples % self.lanes  # lane of the epoch's first position; `longer` lanes from it on
        last = first + longer
        wrapped = max(0, last - self.lanes)
        extra_before = min(lane, wrapped) + min(max(lane - first, 0), longer - wrapped)
        is_longer = first <= lane < last or lane < wrapped
        begin = lane * short + extra_before
        return begin, begin + short + is_longer

    def sample(self, position: int) -> int:
        """Return the index of the sample at `position`."""
        epoch, offset = divmod(position, self.samples)
        lane, k = position % self.lanes, offset // self.lanes
        window, at = divmod(k, self.window)
        k = window * self.window + int(self._window_of(epoch, lane, window)[at])
        ends, starts = self._pieces_of(epoch, lane)
        piece = int(np.searchsorted(ends, k, "right"))
        return int(starts[piece]) + k - (int(ends[piece - 1]) if piece else 0)

    def _make_pieces(self, epoch: int, lane: int) -> tuple[IntArray, IntArray]:
        """Return the pieces in the order they are read: where each ends in the lane, and where it starts in the set."""
        begin, end = self.lane(epoch, lane)
        first = int(np.searchsorted(self.firsts, begin, "right")) - 1
        last = int(np.searchsorted(self.firsts, end, "left"))
        cuts = np.clip(self.firsts[first : last + 1], begin, end)
        order = permutation(len(cuts) - 1, self.seed, epoch, lane)
        return np.cumsum(np.diff(cuts)[order]), cuts[:-1][order]

    def _make_window(self, epoch: int, lane: int, window: int) -> IntArray:
        begin, end = self.lane(epoch, lane)
        size = min(self.window, end - begin - window * self.window)
        return permutation(size, self.seed, epoch, lane, window)
