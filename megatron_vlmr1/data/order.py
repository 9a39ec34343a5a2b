"""The order of samples: a pure function of (seed, position), the same for every number of ranks.

Position `p` of a run belongs to epoch ``p // N`` of a set of N samples, and to lane ``p % L``. In each epoch the
concatenated index is cut into L lanes: contiguous ranges of N // L or N // L + 1 samples, lane 0 first. The lanes
that own the epoch's last, incomplete round of positions are the longer ones, so every epoch delivers each sample
exactly once and positions never skip a lane. Where L does not divide N these longer lanes change from epoch to epoch
and the cuts between lanes move by less than L samples.

Within a lane the pieces of its shards are permuted, then samples within windows of the resulting sequence. Random
numbers are raw Philox words keyed by sha256: both are specified, so an upgrade of numpy cannot change a run's order.

A mixture deals positions out to several sets, each of which has an order of its own over the same lanes. What a lane
gives to a set goes to the same lane of that set, so each lane still reads its own range of every set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from megatron_vlmr1.types import IntArray


def permutation(n: int, *key: int) -> IntArray:
    """Return a permutation of range(n) that depends on `key` alone."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    words = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(n)
    return np.argsort(words, kind="stable")


MAX_TURNS = 1000
"""Longest block of a mixture; finer weights are rounded to parts of it."""


def turns(weights: Sequence[float]) -> tuple[int, ...]:
    """Return how many turns of a block each weight gets: the shortest block that is exact, else one of `MAX_TURNS`.

    Raises:
        ValueError: a weight is too small next to the others to get any.
    """
    parts = [weight / max(weights) for weight in weights]  # the sum of the weights themselves may be infinite
    shares = [part / sum(parts) for part in parts]
    for block in range(1, MAX_TURNS + 1):
        counts = [round(share * block) for share in shares]
        if sum(counts) == block and all(abs(s * block - c) < 1e-9 * block for s, c in zip(shares, counts, strict=True)):
            break
    else:
        counts = [int(share * MAX_TURNS) for share in shares]
        largest_rest = sorted(range(len(shares)), key=lambda i: (counts[i] - shares[i] * MAX_TURNS, i))
        for i in largest_rest[: MAX_TURNS - sum(counts)]:
            counts[i] += 1
    if 0 in counts:
        raise ValueError(
            f"data.train: weight {weights[counts.index(0)]:g} is less than one part in {MAX_TURNS} of all weights"
        )
    return tuple(counts)


class Mixer:
    """Deals positions out to the sets of a mixture.

    The turns of a lane come in blocks; in each block every set gets exactly its number of turns, in an order shuffled
    for each block and lane. The k-th turn of lane l that goes to a set is the set's own position ``k * lanes + l``.

    Args:
        counts: turns of each set in a block.
        seed: seed of the shuffles.
        lanes: number of lanes.
    """

    def __init__(self, counts: Sequence[int], seed: int, lanes: int) -> None:
        assert lanes > 0 and min(counts) > 0
        self.counts, self.seed, self.lanes, self.block = tuple(counts), seed, lanes, sum(counts)
        self._members = np.repeat(np.arange(len(counts)), counts)
        self._block_of = lru_cache(maxsize=2 * lanes)(self._make_block)

    def place(self, position: int) -> tuple[int, int]:
        """Return (set, position within the set's own order)."""
        if len(self.counts) == 1:
            return 0, position
        turn, lane = divmod(position, self.lanes)
        block, at = divmod(turn, self.block)
        members, earlier = self._block_of(block, lane)
        member = int(members[at])
        return member, (block * self.counts[member] + int(earlier[at])) * self.lanes + lane

    def _make_block(self, block: int, lane: int) -> tuple[IntArray, IntArray]:
        """Return the set of each turn, and how many turns of the block that set had before."""
        # Five words: no key of a lane or window has as many.
        members = self._members[permutation(self.block, self.seed, 0, block, lane, 0)]
        earlier = np.empty_like(members)
        for member, count in enumerate(self.counts):
            earlier[members == member] = np.arange(count)
        return members, earlier


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
