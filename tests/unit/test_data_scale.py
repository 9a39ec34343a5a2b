"""A million samples: 64 ranks share them out exactly and evenly, and neither start nor seek needs much memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np

from megatron_vlmr1.data.index import ShardIndex, ShardSet, index_path, write_index
from megatron_vlmr1.data.mixture import Mixture
from megatron_vlmr1.data.stream import Stream

N = 1_000_000


def synthetic(directory: Path, shards: int, per_shard: int, seed: int = 0) -> ShardSet:
    """A set without tars: an index of one json member a sample, of sizes that differ as those of pictures do."""
    rng = np.random.default_rng(seed)
    keys = "".join(f"{i:09d}" for i in range(per_shard)).encode()

    def one(number: int) -> ShardIndex:
        sizes = np.exp(rng.normal(11, 0.7, per_shard)).astype(np.uint64)
        return ShardIndex(
            shard=f"shard-{number:06d}.tar",
            starts=np.arange(per_shard + 1),
            offsets=np.cumsum(sizes + 1024) - sizes,
            sizes=sizes,
            kinds=np.zeros(per_shard, np.uint8),
            key_ends=9 * np.arange(1, per_shard + 1),
            keys=keys,
            sha256=np.zeros((per_shard, 32), np.uint8),
        )

    return ShardSet(directory, (one(number) for number in range(shards)))


def sample_sizes(shards: ShardSet) -> np.ndarray:
    return np.concatenate([index.sizes for index in shards._indexes]).astype(np.int64)


def test_64_streams_cover_a_million_samples_exactly_once(tmp_path: Path) -> None:
    """Each rank reads 1/64 of them, from its own range, and about as many bytes as any other."""
    big = synthetic(tmp_path, 500, 2000)
    sizes = sample_sizes(big)
    streams = [Stream(big, 7, 64, 1024, rank, 64, consumed=3 * N) for rank in range(64)]
    seen = np.zeros(N, np.int64)
    read = []
    for rank, stream in enumerate(streams):
        positions = stream.take(N)
        assert positions == list(range(3 * N + rank, 4 * N, 64))
        mine = np.array([stream.sample(position)[1] for position in positions])
        seen += np.bincount(mine, minlength=N)
        assert mine.max() - mine.min() < N // 64  # a contiguous range
        read.append(int(sizes[mine].sum()))
    assert (seen == 1).all()
    assert max(read) < 1.05 * min(read)
    assert all(stream.consumed == 4 * N for stream in streams)


def test_64_streams_over_a_mixture(tmp_path: Path) -> None:
    """Whole blocks of two sets: exact shares, no sample twice within an epoch, even bytes."""
    first, second = synthetic(tmp_path, 60, 1000), synthetic(tmp_path, 40, 1000, seed=1)
    sizes = [sample_sizes(first), sample_sizes(second)]
    mixed = Mixture([first, second], [3, 2])
    total = 64 * 5 * 300  # blocks of both sets: 57,600 and 38,400 samples
    seen = [np.zeros(len(s), np.int64) for s in sizes]
    read = []
    for rank in range(64):
        stream = Stream(mixed, 7, 64, 256, rank, 64)
        places = [stream.sample(position) for position in stream.take(total)]
        for member, i in places:
            seen[member][i] += 1
        read.append(sum(int(sizes[member][i]) for member, i in places))
    assert [int(s.sum()) for s in seen] == [57_600, 38_400] and max(int(s.max()) for s in seen) == 1
    assert max(read) < 1.12 * min(read)  # 1,500 samples a rank: a standard deviation of 2 % from their sizes alone


def test_opening_a_million_samples_takes_little_memory(tmp_path: Path) -> None:
    one = synthetic(tmp_path, 1, 20_000)._indexes[0]
    for i in range(50):
        write_index(one, index_path(tmp_path / f"shard-{i:06d}.tar"))
    tracemalloc.start()
    big = ShardSet.open(tmp_path)
    stream = Stream(big, 7, 64, 1024, 5, 64)
    places = [stream.locate(position) for position in (5, 987_654_325, 123_456_789_013)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(big) == N and len({shard for shard, _ in places}) > 1
    assert peak < 200e6
    assert big.locate(N - 1) == ("shard-000049.tar", "000019999")
