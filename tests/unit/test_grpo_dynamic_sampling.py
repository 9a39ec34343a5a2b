"""Which groups a refilled batch keeps, when it stops, and that ranks agree."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from megatron_vlmr1.grpo.dynamic_sampling import Batch
from megatron_vlmr1.parallel import reduce
from megatron_vlmr1.types import Completion, Group, Prompt, Score
from tests.distributed import ranks


@pytest.fixture(scope="module", autouse=True)
def alone():
    with ranks.alone():
        yield


def group(position: int, *values: float | None) -> Group:
    ids = np.zeros(1, np.int64)
    completion = Completion(ids, np.zeros(1, np.float32), "stop", "")
    prompt = Prompt(position, f"k{position}", ids, np.zeros((3, 1), np.int64), (), "", "")
    scores = tuple(Score(None, failure="late") if v is None else Score(v) for v in values)
    return Group(prompt, (completion,) * len(values), scores)


def good(position: int) -> Group:
    return group(position, 0.0, 1.0)


def flat(position: int) -> Group:
    return group(position, 0.5, 0.5)


def positions(groups: Sequence[Group]) -> list[int]:
    return [g.prompt.position for g in groups]


def test_without_refilling_one_round_is_all():
    batch = Batch(3, 0, first=6)
    assert batch.wants_more
    batch.add([good(6), flat(7), group(8, None, 1.0)])
    assert not batch.wants_more
    assert positions(batch.kept) == positions(batch.drawn) == [6, 7, 8] and batch.rounds == 1


def test_it_refills_and_cuts_the_surplus():
    batch = Batch(3, 9, first=6)
    batch.add([flat(6), good(7), group(8, None, 1.0)])  # a single score compares with nothing
    assert batch.wants_more
    batch.add([flat(9), group(10, None, 1.0, 0.0), flat(11)])
    assert batch.wants_more
    batch.add([good(12), good(13), good(14)])
    assert not batch.wants_more
    assert positions(batch.kept) == [7, 10, 12]
    assert positions(batch.drawn) == list(range(6, 15)) and batch.rounds == 3


def test_a_full_first_round_is_enough():
    batch = Batch(2, 9, first=0)
    batch.add([good(0), good(1)])
    assert not batch.wants_more and positions(batch.kept) == [0, 1]


@pytest.mark.parametrize("max_rounds", [1, 4])
def test_it_ends_when_no_score_ever_differs(max_rounds):
    batch = Batch(2, max_rounds, first=10)
    while batch.wants_more:
        start = 10 + 2 * batch.rounds
        batch.add([flat(start), flat(start + 1)])
    assert batch.rounds == max_rounds and batch.kept == [] and len(batch.drawn) == 2 * max_rounds


def test_lost_positions_are_refilled_too():
    batch = Batch(2, 3, first=0)
    batch.add([good(1)])  # position 0 is damaged
    assert batch.wants_more
    batch.add([])
    assert batch.wants_more
    batch.add([flat(4), good(5)])
    assert positions(batch.kept) == [1, 5]


def test_every_rank_keeps_its_part_of_the_same_choice(monkeypatch):
    """Two data-parallel ranks with the even and the odd positions, their reductions joined by hand."""
    rounds = [
        [flat(0), good(1), flat(2), flat(3)],
        [flat(4), good(5), flat(6), good(7)],
        [good(8), good(9), good(10), good(11)],
    ]
    kept = []
    for rank in range(2):
        batch = Batch(4, 5, first=0)
        for drawn in rounds:
            assert batch.wants_more
            found = {str(g.prompt.position): float(g.scores[0] != g.scores[1]) for g in drawn}
            monkeypatch.setattr(reduce, "maxima", lambda values, speaks, f=found: {**values, **f})
            batch.add(drawn[rank::2])
        assert not batch.wants_more
        kept.append(positions(batch.kept))
    assert kept == [[8], [1, 5, 7]]
