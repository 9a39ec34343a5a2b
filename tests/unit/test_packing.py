"""Groups to packed micro-batches: shapes, label rows, positions, shared images, sizes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megatron_vlmr1.data.packing import PackedGroup, pack, split_by_tokens
from megatron_vlmr1.models.mrope import mrope_positions
from megatron_vlmr1.models.segments import Segment
from megatron_vlmr1.types import ImagePatches, Prompt
from tests.checkpoints import random_image

IMAGE = 500


def prompt(position: int, text: int, *images: ImagePatches) -> Prompt:
    ids = np.arange(1, text + 1) + 10 * position
    for image in images:
        ids = np.concatenate((ids, np.full(len(image.patches) // 4, IMAGE), [7]))
    grids = [image.grid_thw for image in images]
    return Prompt(position, "k", ids, mrope_positions(ids, grids, IMAGE, 2), images, "", "")


def group(p: Prompt, *completions: list[int], first: int = 0) -> PackedGroup:
    arrays = tuple(np.array(c, np.int64) for c in completions)
    return PackedGroup(p, arrays, tuple(range(first, first + len(arrays))))


def test_a_prompt_once_then_its_completions():
    batch = pack([group(prompt(0, 3), [101, 102, 103], [111]), group(prompt(1, 2), [121, 122], first=2)], IMAGE, 1)
    #              prompt 0 | 101 102 | (nothing of 111) | prompt 1 | 121
    assert batch.token_ids.tolist() == [1, 2, 3, 101, 102, 11, 12, 121]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2]] * 3
    assert batch.segments == (
        Segment(0, 3),
        Segment(3, 5, (0, 3)),
        Segment(5, 5, (0, 3)),
        Segment(5, 7),
        Segment(7, 8, (5, 7)),
    )
    # The prompt's last position predicts the first token of each completion.
    assert batch.label_rows.tolist() == [2, 3, 4, 2, 6, 7]
    assert batch.label_ids.tolist() == [101, 102, 103, 111, 121, 122]
    assert batch.label_slots.tolist() == [0, 0, 0, 1, 2, 2]
    assert batch.label_index.tolist() == [0, 1, 2, 0, 0, 1]
    assert batch.images == () and batch.image_rows.tolist() == []


def test_every_label_is_predicted_by_the_token_before_it():
    completions = ([101, 102, 103, 104], [111], [121, 122])
    groups = [group(prompt(i, 4 + i), *completions, first=3 * i) for i in range(3)]
    batch = pack(groups, IMAGE, 1)
    for slot in range(9):
        mine = batch.label_slots == slot
        p, tokens = groups[slot // 3].prompt, completions[slot % 3]
        before = [int(p.token_ids[-1]), *tokens[:-1]]
        assert batch.token_ids[batch.label_rows[mine]].tolist() == before
        assert batch.label_ids[mine].tolist() == list(tokens)
        positions = batch.positions[:, batch.label_rows[mine]]
        expected = np.concatenate(([p.next_position - 1], p.next_position + np.arange(len(tokens) - 1)))
        assert (positions == expected).all()


def test_completions_go_on_from_the_largest_position_of_the_prompt():
    p = prompt(0, 2, random_image(0, 4, 12))
    assert p.next_position < len(p.token_ids)  # an image spreads less far than it has tokens
    batch = pack([group(p, [101, 102, 103])], IMAGE, 1)
    n = len(p.token_ids)
    assert (batch.positions[:, :n] == p.mrope_positions).all()
    assert batch.positions[:, n:].tolist() == [[p.next_position, p.next_position + 1]] * 3


def test_equal_images_are_packed_once():
    first, second = random_image(0, 4, 4), random_image(1, 2, 6)
    again = replace(first, patches=first.patches.copy())
    batch = pack([group(prompt(0, 1, first, second), [101, 102]), group(prompt(1, 1, second, again), [103])], IMAGE, 1)
    assert [image.digest for image in batch.images] == [first.digest, second.digest]
    assert batch.image_order == (0, 1, 1, 0)
    assert batch.image_rows.tolist() == np.flatnonzero(batch.token_ids == IMAGE).tolist()
    assert len(batch.image_rows) == 2 * (4 + 3)


@pytest.mark.parametrize("multiple", [1, 2, 4, 8])
def test_padding_sees_itself_only_and_predicts_nothing(multiple):
    groups = [group(prompt(0, 3), [101, 102, 103])]
    batch, tight = pack(groups, IMAGE, multiple), pack(groups, IMAGE, 1)
    size = -(-5 // multiple) * multiple
    assert batch.token_ids.shape == (size,) and batch.positions.shape == (3, size)
    assert batch.token_ids[:5].tolist() == tight.token_ids.tolist() and not batch.token_ids[5:].any()
    assert batch.segments[: len(tight.segments)] == tight.segments
    assert batch.segments[len(tight.segments) :] == ((Segment(5, size),) if size > 5 else ())
    assert batch.label_rows.tolist() == tight.label_rows.tolist()


def test_padding_is_no_image_where_the_image_token_is_zero():
    batch = pack([group(prompt(0, 3), [101, 102])], 0, 8)
    assert batch.image_rows.tolist() == []


@pytest.mark.parametrize("multiple", [1, 2, 4])
def test_an_empty_pack_is_padding(multiple):
    batch = pack([], IMAGE, multiple)
    assert batch.token_ids.tolist() == [0] * multiple
    assert batch.segments == (Segment(0, multiple),)
    for labels in (batch.label_rows, batch.label_ids, batch.label_slots, batch.label_index):
        assert labels.shape == (0,) and labels.dtype == np.int64


def test_a_prompt_without_completions():
    batch = pack([group(prompt(0, 3)), group(prompt(1, 2))], IMAGE, 1)
    assert batch.token_ids.tolist() == [1, 2, 3, 11, 12] and batch.label_ids.tolist() == []


@pytest.mark.parametrize("seed", range(20))
def test_split_by_tokens(seed):
    """A micro-batch never exceeds the budget, except where a single completion with its prompt does."""
    rng = np.random.default_rng(seed)
    groups = [
        group(prompt(i, int(rng.integers(1, 40))), *[[1] * int(rng.integers(1, 30)) for _ in range(g)], first=10 * i)
        for i, g in enumerate(rng.integers(1, 6, int(rng.integers(1, 30))))
    ]
    budget, at_least = int(rng.integers(20, 200)), int(rng.integers(1, 4))
    parts = split_by_tokens(groups, budget, at_least)
    assert all(parts) and len(parts) >= min(at_least, len(groups))
    for part in parts:
        tokens = len(pack(part, IMAGE, 1).token_ids)
        assert tokens == sum(g.tokens for g in part)
        assert tokens <= budget or (len(part) == 1 and len(part[0].completions) == 1)
    assert len(parts) >= sum(g.tokens for g in groups) / max(budget, *(g.tokens for g in groups))
    found = {slot: (g, c) for part in parts for g in part for slot, c in zip(g.slots, g.completions, strict=True)}
    assert len(found) == sum(len(g.completions) for g in groups)
    for g in groups:
        for slot, c in zip(g.slots, g.completions, strict=True):
            assert found[slot][0].prompt is g.prompt and found[slot][1] is c
    whole = {id(g) for part in parts for g in part}
    assert all(id(g) in whole for g in groups if g.tokens <= budget)  # what fits is not cut


def test_a_group_is_cut_between_completions():
    long = group(prompt(0, 10), *[[1] * n for n in (6, 1, 11, 6)], first=3)
    # A prompt of 10 and 5, 0, 10, 5 fed tokens in 20: the longest fills one part, twice five the other.
    (first,), (second,) = split_by_tokens([long], 20)
    assert (first.tokens, second.tokens) == (20, 20)
    assert sorted([first.slots, second.slots]) == [(3, 6), (4, 5)]
    parts = split_by_tokens([long], 10)
    assert sorted(slot for (part,) in parts for slot in part.slots) == [3, 4, 5, 6] and len(parts) == 4
    batch = pack(parts[0], IMAGE, 1)
    assert batch.token_ids[:10].tolist() == long.prompt.token_ids.tolist()


def test_micro_batches_are_balanced_by_cost():
    groups = [group(prompt(i, n), [1]) for i, n in enumerate((30, 30, 10, 10))]
    costs = {30: 1, 10: 9}
    parts = split_by_tokens(groups, 60, 2, lambda g: costs[g.tokens])
    assert [[g.prompt.position for g in part] for part in parts] == [[0, 2], [1, 3]]


def test_split_makes_as_many_as_asked_for_where_groups_are_alike():
    groups = [group(prompt(i, 10), [1]) for i in range(12)]
    for at_least in (1, 2, 3, 4, 6, 12):
        assert [len(part) for part in split_by_tokens(groups, 1000, at_least)] == [12 // at_least] * at_least
    assert [len(part) for part in split_by_tokens(groups, 40, 1)] == [4, 4, 4]
    assert len(split_by_tokens(groups[:1], 1000, 2)) == 1
    assert split_by_tokens([], 10, 2) == []
