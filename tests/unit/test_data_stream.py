"""The data order: a permutation per epoch, the same for every number of ranks and after every resume."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron_vlmr1.data import order
from megatron_vlmr1.data.index import ShardIndex, ShardSet
from megatron_vlmr1.data.order import Order, permutation
from megatron_vlmr1.data.shards import build
from megatron_vlmr1.data.stream import Stream
from megatron_vlmr1.types import Damage

PINNED_PERMUTATION = [2, 6, 5, 4, 0, 1, 7, 3]
PINNED_ORDER = [5, 31, 55, 81, 0, 30, 56, 82, 6, 28, 53, 76]


def firsts(*lengths: int) -> np.ndarray:
    return np.cumsum([0, *lengths])


def synthetic(directory: Path, shards: int, per_shard: int) -> ShardSet:
    """A set without tars: an index of one json member a sample."""
    count = np.arange(per_shard, dtype=np.uint64)
    keys = [f"{i:09d}" for i in range(per_shard)]
    tables = dict(
        starts=np.arange(per_shard + 1),
        offsets=512 + 1024 * count,
        sizes=np.full(per_shard, 300, np.uint64),
        kinds=np.zeros(per_shard, np.uint8),
        key_ends=9 * (count + 1),
        keys="".join(keys).encode(),
        sha256=np.zeros((per_shard, 32), np.uint8),
    )
    return ShardSet(directory, (ShardIndex(shard=f"shard-{i:06d}.tar", **tables) for i in range(shards)))


@pytest.mark.parametrize("lanes", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("lengths", [(1,), (5,), (64,), (97,), (10, 0, 30, 1, 60), (7,) * 20], ids=str)
def test_every_epoch_is_a_permutation(lengths: tuple[int, ...], lanes: int) -> None:
    n = sum(lengths)
    mapping = Order(firsts(*lengths), seed=3, lanes=lanes, window=8)
    epochs = [[mapping.sample(epoch * n + i) for i in range(n)] for epoch in range(5)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    if n > 2 * lanes and n > 20:
        assert len({tuple(epoch) for epoch in epochs}) == 5


@pytest.mark.parametrize("lanes", [1, 4, 7, 64])
def test_lanes_are_contiguous_ranges_and_own_their_positions(lanes: int) -> None:
    for n in (3, 64, 100, 131):
        mapping = Order(firsts(n), seed=0, lanes=lanes, window=16)
        for epoch in range(min(2 * lanes, 20)):
            cuts = [mapping.lane(epoch, lane) for lane in range(lanes)]
            assert cuts[0][0] == 0 and cuts[-1][1] == n
            assert all(left[1] == right[0] for left, right in zip(cuts, cuts[1:], strict=False))
            assert {end - begin for begin, end in cuts} <= {n // lanes, n // lanes + 1}
            assert max(abs(begin - mapping.lane(0, lane)[0]) for lane, (begin, _) in enumerate(cuts)) < lanes
            for position in range(epoch * n, (epoch + 1) * n):
                begin, end = cuts[position % lanes]
                assert begin <= mapping.sample(position) < end


def test_order_depends_on_the_seed_and_is_pinned() -> None:
    """A change of these numbers would break the resume of every run."""
    first, second = (Order(firsts(40, 60), seed, lanes=4, window=8) for seed in (0, 1))
    assert permutation(8, 1, 2, 3).tolist() == PINNED_PERMUTATION
    assert [first.sample(i) for i in range(12)] == PINNED_ORDER
    assert [first.sample(i) for i in range(100)] != [second.sample(i) for i in range(100)]


def test_windows_bound_the_shuffle() -> None:
    """A window's worth of a lane's draws comes from a window's worth of its pieces: a small cache suffices."""
    mapping = Order(firsts(*(10,) * 40), seed=5, lanes=2, window=20)
    for lane in range(2):
        drawn = [mapping.sample(lane + 2 * k) for k in range(200)]
        for window in range(10):
            shards = {sample // 10 for sample in drawn[20 * window : 20 * (window + 1)]}
            assert len(shards) <= 3
    assert [mapping.sample(2 * k) // 10 for k in range(200)] != sorted(mapping.sample(2 * k) // 10 for k in range(200))


def test_shuffle_is_fair() -> None:
    """First draw of a lane over seeds: uniform over its samples, chi-squared within 5 sigma."""
    counts = Counter(Order(firsts(5, 5, 5, 5), seed, lanes=2, window=100).sample(0) for seed in range(4000))
    assert set(counts) == set(range(10))
    chi = sum((count - 400) ** 2 / 400 for count in counts.values())
    assert chi < 9 + 5 * 18**0.5


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    directory = tmp_path_factory.mktemp("stream")
    rows = [
        {"conversations": [{"from": "human", "value": f"q{i}"}, {"from": "gpt", "value": f"{i}"}]} for i in range(83)
    ]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build([directory / "rows.jsonl"], [directory], directory / "out", shard_bytes=20_000)
    return ShardSet.open(directory / "out")


def draw(shards: ShardSet, dp_size: int, consumed: int, steps: int, batch: int) -> list[list[tuple[int, str]]]:
    """Global batches (position, key) of a run on `dp_size` ranks."""
    streams = [Stream(shards, 11, 8, 16, rank, dp_size, consumed) for rank in range(dp_size)]
    batches = []
    for _ in range(steps):
        parts = [stream.next(batch) for stream in streams]
        assert {len(part) for part in parts} == {batch // dp_size}
        assert all(position % dp_size == rank for rank, part in enumerate(parts) for position, _ in part)
        assert all(part == sorted(part, key=lambda item: item[0]) for part in parts)
        batches.append(sorted((position, item.key) for part in parts for position, item in part))
    return batches


def test_resume_on_any_ranks_equals_the_uninterrupted_run(shards: ShardSet) -> None:
    whole = draw(shards, 1, 0, 60, 8)  # 480 positions: nearly six epochs
    flat = [item for batch in whole for item in batch]
    assert [position for position, _ in flat] == list(range(480))
    for epoch in range(5):
        assert len({key for _, key in flat[83 * epoch : 83 * (epoch + 1)]}) == 83
    rng = np.random.default_rng(0)
    for _ in range(25):
        done, seen = 0, []
        while done < 60:
            steps = min(int(rng.integers(1, 30)), 60 - done)
            seen += draw(shards, int(rng.choice([1, 2, 4, 8])), 8 * done, steps, 8)
            done += steps
        assert seen == whole
    other_batch = draw(shards, 4, 0, 40, 12)
    assert [item for batch in other_batch for item in batch] == flat


def test_positions_foresee_next_without_reading(shards: ShardSet) -> None:
    stream = Stream(ShardSet.open(shards.directory), 1, 8, 16, dp_rank=3, dp_size=4, consumed=20)
    foreseen = stream.positions(16)
    assert foreseen == [23, 27, 31, 35] and stream.consumed == 20 and not stream.mixture.shards_read
    places = [stream.locate(position) for position in foreseen]
    items = stream.next(16)
    assert [position for position, _ in items] == foreseen and stream.consumed == 36
    assert [item.key for _, item in items] == [key for _, key in places]
    assert stream.mixture.shards_read == {shard for shard, _ in places}


def test_damage_keeps_its_position(shards: ShardSet, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(shards.directory, tmp_path / "copy")
    (tmp_path / "copy" / shards.names[1]).unlink()
    broken = Stream(ShardSet.open(tmp_path / "copy"), 11, 8, 16, 0, 1)
    whole = Stream(shards, 11, 8, 16, 0, 1)
    pairs = list(zip(broken.next(80), whole.next(80), strict=True))
    assert all(left[0] == right[0] and left[1].key == right[1].key for left, right in pairs)
    lost = [item for (_, item), _ in pairs if isinstance(item, Damage)]
    assert lost and {item.shard for item in lost} == {shards.names[1]}


def test_illegal_sizes_name_the_setting(shards: ShardSet, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data.lanes=8 must be a multiple of the data-parallel size 3"):
        Stream(shards, 0, 8, 16, 0, 3)
    with pytest.raises(ValueError, match="train.prompts_per_step=6 must be a multiple of the data-parallel size 4"):
        Stream(shards, 0, 8, 16, 0, 4).next(6)
    with pytest.raises(ValueError, match="hold no samples"):
        Stream(synthetic(tmp_path, 2, 0), 0, 8, 16, 0, 4)


def test_caches_stay_bounded() -> None:
    mapping = Order(firsts(*(50,) * 20), seed=0, lanes=4, window=10)
    for position in range(3000):
        mapping.sample(position)
    assert mapping._window_of.cache_info().currsize <= 8 and mapping._pieces_of.cache_info().currsize <= 8
    assert mapping._window_of.cache_info().misses <= 3000 / 10 * 1.2 + 8
    assert order.permutation(0, 1).tolist() == []
