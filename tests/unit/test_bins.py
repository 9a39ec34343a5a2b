"""Items to bins: within room, about equal, proven bounds, few moves, the same every time."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from megatron_vlmr1.data.bins import KEEP_TOLERANCE, destinations, fill


def draw(seed: int) -> list[list[int]]:
    """Long-tailed costs of a few ranks' groups; some ranks have fewer, some groups cost nothing."""
    rng = np.random.default_rng(seed)
    ranks = int(rng.integers(2, 9))
    rows = [(1e9 * rng.lognormal(0, 1, int(rng.integers(0, 12)))).astype(int).tolist() for _ in range(ranks)]
    return [[0 if rng.random() < 0.1 else cost for cost in row] for row in rows]


def loads(table: list[list[int]], where: list[list[int]]) -> list[int]:
    out = [0] * len(table)
    for row, ranks in zip(table, where, strict=True):
        for cost, rank in zip(row, ranks, strict=True):
            out[rank] += cost
    return out


@pytest.mark.parametrize("seed", range(100))
def test_ranks_cost_about_the_same(seed):
    table = draw(seed)
    where = destinations(table)
    after, everything = loads(table, where), sum(map(sum, table))
    dearest = max(itertools.chain(*table), default=0)
    m = len(table)
    # Graham's bound for largest first, and the tolerance for what stays at home.
    assert max(after) <= (1 + 1 / KEEP_TOLERANCE) * (everything / m + (1 - 1 / m) * dearest)
    assert sum(after) == everything
    assert destinations(table) == where
    for rank, (row, to) in enumerate(zip(table, where, strict=True)):
        assert all(t == rank for cost, t in zip(row, to, strict=True) if not cost)


@pytest.mark.parametrize("seed", range(20))
def test_small_cases_against_the_best_of_all_assignments(seed):
    rng = np.random.default_rng(seed)
    table = [rng.integers(1, 100, int(rng.integers(1, 4))).tolist() for _ in range(3)]
    costs = list(itertools.chain(*table))
    best = min(
        max(sum(c for c, b in zip(costs, bins, strict=True) if b == rank) for rank in range(3))
        for bins in itertools.product(range(3), repeat=len(costs))
    )
    assert max(loads(table, destinations(table))) <= (1 + 1 / KEEP_TOLERANCE) * (4 / 3 - 1 / 9) * best


def test_what_is_balanced_stays():
    assert destinations([[5, 1], [3, 3]]) == [[0, 0], [1, 1]]
    assert destinations([[], []]) == [[], []]
    assert destinations([[0, 0], []]) == [[0, 0], []]


def test_ties_go_to_the_lower_rank():
    # The best is one rank with two items: the two that come first stay, the others go round.
    assert destinations([[4, 4, 4, 4], [], []]) == [[0, 0, 1, 2], [], []]
    assert destinations([[4], [4, 4, 4], []]) == [[0], [1, 1, 2], []]


def test_few_items_move():
    """Alike ranks of long-tailed costs: a largest-first assignment from scratch would move 7 of 8 items."""
    moved = total = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        table = [(1e9 * rng.lognormal(0, 0.7, 16)).astype(int).tolist() for _ in range(8)]
        where = destinations(table)
        assert max(loads(table, where)) <= 1.06 * sum(map(sum, table)) / 8
        moved += sum(to != rank for rank, row in enumerate(where) for to in row)
        total += 8 * 16
    assert moved / total < 0.2


@pytest.mark.parametrize("seed", range(50))
def test_fill(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 40))
    sizes = rng.integers(0, 60, n).tolist()
    costs = rng.integers(1, 1000, n).tolist()
    room, at_least = int(rng.integers(-5, 200)), int(rng.integers(1, 6))
    bins = fill(costs, sizes, room, at_least)
    assert sorted(itertools.chain(*bins)) == list(range(n))
    assert len(bins) >= min(n, at_least) and all(bins)
    for items in bins:
        assert items == sorted(items)
        assert len(items) == 1 or sum(sizes[i] for i in items) <= room
    assert fill(costs, sizes, room, at_least) == bins


def test_fill_balances_by_cost_within_room():
    # Three cheap long ones and three dear short ones: by size alone the dear ones would lie together.
    assert fill([1, 1, 1, 9, 9, 9], [30, 30, 30, 10, 10, 10], 60, 3) == [[0, 3], [1, 4], [2, 5]]
    assert fill([], [], 10, 3) == []
    assert fill([5], [100], 10) == [[0]]


@pytest.mark.parametrize("seed", range(30))
def test_fill_is_within_grahams_bound_where_there_is_room(seed):
    rng = np.random.default_rng(seed)
    costs = rng.integers(1, 1000, 40).tolist()
    loads = [sum(costs[i] for i in items) for items in fill(costs, [1] * 40, 40, 4)]
    assert len(loads) == 4 and max(loads) <= sum(costs) / 4 + 0.75 * max(costs)
