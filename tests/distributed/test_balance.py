"""Groups exchanged between data-parallel ranks and cut by the token budget: gradients are those of plain autograd."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoints import banned_ids, plain_model
from tests.distributed import plain, ranks
from tests.distributed.plain import within

LAYOUTS = {"dp2": [[0], [1]], "tp2_dp2": [[0, 1], [2, 3]], "pp2_dp2": [[0, 2], [1, 3]]}  # ranks of each copy


@pytest.fixture(scope="module")
def results(checkpoints) -> Path:
    from tests.distributed import work_balance

    ranks.run(2, work_balance.pair, checkpoints)
    ranks.run(4, work_balance.four, checkpoints)
    return checkpoints


@pytest.fixture(scope="module")
def expected(checkpoints) -> tuple[plain.Tensors, float]:
    from tests.distributed.work_balance import lopsided_groups

    directory = checkpoints / "untied"
    model, reference = plain_model(directory), plain_model(checkpoints / "untied_reference")
    loss, _ = plain.grpo_loss(model, reference, lopsided_groups(directory), banned_ids(directory), beta=0.04)
    return plain.gradients(model, loss), float(loss)


def seen_by(results: Path, layout: str) -> list[list[dict[str, Any]]]:
    """What the ranks of each copy of the model wrote."""
    return [
        [json.loads((results / f"balanced_{layout}_{rank}.json").read_text()) for rank in copy]
        for copy in LAYOUTS[layout]
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients(results, expected, layout, record_property):
    from tests.distributed.work_balance import BUDGETS, LENGTHS

    gradients, loss = expected
    for budget in BUDGETS:
        found = plain.read(results / f"balanced_{layout}_{budget}")
        difference, name = plain.worst(found, gradients)
        within(record_property, f"{layout} {budget}", difference, 1e-5, name)
    for one in (one for copy in seen_by(results, layout) for one in copy):
        assert one["metrics"]["train/loss"] == pytest.approx(loss, abs=1e-6)
        failed = LENGTHS[0][1] + LENGTHS[3][1]
        assert one["metrics"]["train/tokens"] == sum(map(sum, LENGTHS)) - failed


def test_the_groups_hold_every_case(checkpoints):
    from megatron_vlmr1.data.packing import PackedGroup, split_by_tokens
    from tests.distributed.work_balance import BUDGETS, LENGTHS, lopsided_groups

    groups = lopsided_groups(checkpoints / "untied")
    packed = [PackedGroup(g.prompt, tuple(c.token_ids for c in g.completions), tuple(range(4))) for g in groups[1:2]]
    parts = split_by_tokens(packed, BUDGETS[0])
    assert len(parts) == 2 and len(split_by_tokens(packed, BUDGETS[1])) == 1  # a group cut in two
    assert packed[0].prompt.images and min(map(min, LENGTHS)) == 1  # its image in both; completions of one token
    assert any(np.isnan(g.advantages).any() for g in groups)  # a removed completion


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_of_a_copy_has_the_same_groups_and_copies_cost_the_same(results, layout, record_property):
    copies = seen_by(results, layout)
    for copy in copies:
        assert all(one["after"] == copy[0]["after"] and one["costs"] == copy[0]["costs"] for one in copy)
    assert sorted(position for copy in copies for position in copy[0]["after"]) == list(range(6))
    costs = {int(position): cost for copy in copies for position, cost in copy[0]["costs"].items()}
    before = [sum(copy[0]["costs"].values()) for copy in copies]
    after = [sum(costs[position] for position in copy[0]["after"]) for copy in copies]
    mean = sum(costs.values()) / 2
    assert max(before) > 1.8 * mean
    record_property("max / mean cost", (max(before) / mean, max(after) / mean))
    assert max(after) <= 1.05 * (mean + max(costs.values()) / 2)  # Graham's bound and the tolerance


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_moved_groups_travel_and_pixels_only_to_the_first_stage(results, layout):
    from tests.distributed.work_balance import lopsided_groups

    groups = {g.prompt.position: g for g in lopsided_groups(results / "untied")}
    for number, copy in enumerate(seen_by(results, layout)):
        stages = copy if layout.startswith("pp") else [None]
        for rank, one in enumerate(copy):
            first = stages[0] is None or rank == 0
            moved = [groups[p] for p in map(int, one["costs"]) if p not in one["after"]]
            pixels = sum(image.patches.nbytes for g in moved for image in g.prompt.images) if first else 0
            arrays = sum(g.prompt.token_ids.nbytes + g.prompt.mrope_positions.nbytes for g in moved)
            arrays += sum(c.token_ids.nbytes + c.logprobs.nbytes for g in moved for c in g.completions)
            assert one["sent_bytes"][number] == 0  # nothing to itself
            assert pixels + arrays <= one["sent_bytes"][1 - number] <= pixels + arrays + 3000 * len(moved)
            assert (one["calls"], one["calls_when_even"]) == (2, 0)  # sizes and bytes; nothing where nothing moves
            if first:
                assert all(
                    n == sum(image.patches.nbytes for image in groups[int(p)].prompt.images)
                    for p, n in one["pixels"].items()
                )
    assert any(sum(one["sent_bytes"]) for copy in seen_by(results, layout) for one in copy)
