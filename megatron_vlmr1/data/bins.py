"""Items to bins of about equal cost: micro-batches of a rank, ranks of a step. Pure, and the same on every rank.

Largest first: items by falling cost, each to the bin with the least so far; ties go to the lower index. With m bins
the dearest one costs at most sum / m + (1 - 1 / m) * (the dearest item), and at most 4/3 - 1/(3m) of the best
possible (R. L. Graham, "Bounds on multiprocessing timing anomalies", 1969).
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush
from itertools import count

KEEP_TOLERANCE = 20
"""A rank may end up dearer than the largest-first solution by one part in so many, if then fewer groups move."""


def fill(costs: Sequence[int], sizes: Sequence[int], room: int, at_least: int = 1) -> list[list[int]]:
    """Put items into as few bins of about equal cost as `room` allows.

    Args:
        costs: of each item.
        sizes: of each item; those of a bin add up to at most `room`, unless a single item is larger.
        room: of a bin.
        at_least: how many bins to make, where there are that many items.

    Returns:
        The items of each bin in rising order, no bin empty, bins in the order of their first items.
    """
    fewest = -(-sum(sizes) // room) if room > 0 else len(sizes)
    if smallest := min(sizes, default=0):
        fewest = max(fewest, -(-len(sizes) // max(1, room // smallest)))  # as many as a bin can hold
    for bins in count(min(len(sizes), max(at_least, fewest))):
        found = _largest_first(costs, sizes, room, bins)
        if found is not None:
            return sorted(sorted(items) for items in found if items)
    raise AssertionError("a bin for each item always does")


def _largest_first(costs: Sequence[int], sizes: Sequence[int], room: int, bins: int) -> list[list[int]] | None:
    """Return the items of each bin, or None where one finds no room."""
    found: list[list[int]] = [[] for _ in range(bins)]
    used = [0] * bins
    cheapest = [(0, b) for b in range(bins)]  # a heap of (cost, bin)
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        full = []
        while cheapest:
            cost, b = heappop(cheapest)
            if not found[b] or used[b] + sizes[item] <= room:
                break
            full.append((cost, b))
        else:
            return None
        found[b].append(item)
        used[b] += sizes[item]
        for bin_ in ((cost + costs[item], b), *full):
            heappush(cheapest, bin_)
    return found


def destinations(table: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return for each rank's items the ranks that shall have them, so that ranks cost about the same.

    Items stay where they are as far as that costs no more than one part in `KEEP_TOLERANCE` of balance. An item that
    costs nothing stays.

    Args:
        table: [ranks][items], costs.
    """
    items = [(cost, rank, i) for rank, row in enumerate(table) for i, cost in enumerate(row) if cost]
    items.sort(key=lambda item: (-item[0], item[1], item[2]))
    spread, load = _placed(items, len(table), limit=0)
    limit = max(load) + max(load) // KEEP_TOLERANCE
    kept, kept_load = _placed(items, len(table), limit)
    chosen = kept if max(kept_load) <= limit else spread
    return [[chosen.get((rank, i), rank) for i in range(len(row))] for rank, row in enumerate(table)]


def _placed(
    items: Sequence[tuple[int, int, int]], ranks: int, limit: int
) -> tuple[dict[tuple[int, int], int], list[int]]:
    """Place sorted items at home where that stays within `limit`, else where there is the least."""
    placed: dict[tuple[int, int], int] = {}
    load = [0] * ranks
    for cost, home, i in items:
        rank = home if load[home] + cost <= limit else load.index(min(load))
        placed[home, i] = rank
        load[rank] += cost
    return placed, load
