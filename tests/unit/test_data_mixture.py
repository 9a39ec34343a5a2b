"""Mixtures: exact counts, and lanes of their own for each rank."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_vlmr1 import config
from megatron_vlmr1.data.index import ShardSet
from megatron_vlmr1.data.mixture import Mixture
from megatron_vlmr1.data.order import MAX_TURNS, Mixer, Order, turns
from megatron_vlmr1.data.shards import build
from megatron_vlmr1.data.stream import Stream
from megatron_vlmr1.types import Damage, Sample

PINNED = [(1, 0), (1, 1), (0, 2), (1, 3), (0, 0), (0, 1), (1, 2), (0, 3), (0, 4), (0, 5), (0, 6), (0, 7)]
WEIGHTS = [(1.0,), (1.0, 1.0), (0.7, 0.3), (2.0, 1.0, 5.0), (1 / 3, 2 / 3), (0.123, 0.877)]


def test_turns_are_the_shortest_exact_block():
    assert [turns(weights) for weights in WEIGHTS] == [(1,), (1, 1), (7, 3), (2, 1, 5), (1, 2), (123, 877)]
    odd = turns((np.pi, np.e, 1.0))
    assert sum(odd) == MAX_TURNS and odd == (458, 396, 146)  # 457.9…, 396.3…, 145.8…
    assert sum(turns([0.1 + i / 997 for i in range(90)])) == MAX_TURNS
    with pytest.raises(ValueError, match=r"data.train: weight 0.0001 is less than one part in 1000 of all weights"):
        turns((1.0, 0.0001))


@pytest.mark.parametrize("lanes", [1, 4, 6])
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_every_block_has_exact_counts_and_lanes_are_kept(weights: tuple[float, ...], lanes: int) -> None:
    counts = turns(weights)
    mixer = Mixer(counts, seed=3, lanes=lanes)
    block = lanes * sum(counts)
    places = [mixer.place(position) for position in range(3 * block)]
    for begin in range(0, 3 * block, block):
        assert Counter(member for member, _ in places[begin : begin + block]) == {
            m: lanes * count for m, count in enumerate(counts)
        }
    for m, count in enumerate(counts):
        own = [place[1] for place in places if place[0] == m]
        assert sorted(own) == list(range(3 * lanes * count))  # each of its positions once
    assert all(own % lanes == position % lanes for position, (_, own) in enumerate(places))
    for lane in range(lanes):  # what a lane gives to a set, it gives in the set's order
        for m in range(len(counts)):
            own = [o for position, (member, o) in enumerate(places) if member == m and position % lanes == lane]
            assert own == sorted(own)
    assert [mixer.place(position) for position in reversed(range(3 * block))] == places[::-1]
    far = 10**15 + 7
    assert 0 <= mixer.place(far)[1] <= far


def test_the_order_of_a_mixture_is_pinned():
    """A change of these numbers would break the resume of every run on a mixture."""
    assert [Mixer((2, 1), 0, 4).place(p) for p in range(12)] == PINNED
    shuffled = {tuple(m for m, _ in (Mixer((5, 5), seed, 1).place(p) for p in range(10))) for seed in range(20)}
    assert len(shuffled) > 15


def test_batches_of_a_mixture_are_mixed():
    """64 lanes draw for themselves: the share of a set in a batch is that of independent draws, not all or nothing."""
    mixer = Mixer((1, 1), seed=0, lanes=64)
    shares = [sum(mixer.place(p)[0] for p in range(first, first + 64)) for first in range(0, 64 * 400, 64)]
    assert abs(np.mean(shares) - 32) < 1 and 2 < np.std(shares) < 5.5


def make(directory: Path, name: str, rows: int) -> Path:
    (directory / f"{name}.jsonl").write_text(
        "".join(
            json.dumps({"conversations": [{"from": "human", "value": f"{name} {i}"}, {"from": "gpt", "value": "1"}]})
            + "\n"
            for i in range(rows)
        )
    )
    build([directory / f"{name}.jsonl"], [directory], directory / name, shard_bytes=10_000)
    return directory / name


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    top = tmp_path_factory.mktemp("mixture")
    return [make(top, "a", 53), make(top, "b", 20), make(top, "c", 9)]


def mixture(places: list[Path], *weights: float) -> Mixture:
    return Mixture.open([(str(place), weight) for place, weight in zip(places, weights, strict=False)])


def test_each_set_has_epochs_of_its_own(places: list[Path]) -> None:
    mixed = mixture(places, 5, 2, 1)
    items = Stream(mixed, 11, 8, 16, 0, 1).next(1280)  # 20 blocks of 64
    flat = [item.question for _, item in items if isinstance(item, Sample)]
    by_set = {name: [q for q in flat if q.startswith(name)] for name in "abc"}
    assert [len(by_set[name]) for name in "abc"] == [800, 320, 160]
    for name, rows in (("a", 53), ("b", 20), ("c", 9)):
        counts = Counter(by_set[name])
        assert len(counts) == rows and max(counts.values()) - min(counts.values()) <= 1


def test_a_set_alone_is_drawn_as_before(places: list[Path]) -> None:
    alone, single = ShardSet.open(places[0]), mixture(places, 7.0)
    assert single.digest() == alone.digest()
    order = Order(alone.firsts, 11, 8, 16)
    stream = Stream(single, 11, 8, 16, 0, 1)
    assert [stream.sample(p) for p in range(300)] == [(0, order.sample(p)) for p in range(300)]


def test_a_rank_reads_its_part_of_every_set(places: list[Path]) -> None:
    mixed = mixture(places, 1, 1, 1)
    for rank in range(4):
        stream = Stream(mixed, 0, 8, 16, rank, 4)
        found = {stream.sample(p) for p in range(rank, 3 * 8 * 2, 4)}  # less than an epoch of a
        lanes = [stream.orders[0].lane(0, lane) for lane in (rank, rank + 4)]
        assert all(any(begin <= i < end for begin, end in lanes) for member, i in found if member == 0)


def test_names_and_digests_tell_sets_apart(places: list[Path], tmp_path: Path) -> None:
    mixed = mixture(places, 1, 1)
    shutil.copytree(places[1], tmp_path / "b")
    for tar in (tmp_path / "b").glob("*.tar"):
        tar.unlink()
    broken = Mixture.open([(str(places[0]), 1.0), (str(tmp_path / "b") + "/", 1.0)])
    assert broken.digest() == mixed.digest() != mixture(places, 2, 1).digest()
    assert mixed.digest() != mixture(places[::-1], 1, 1).digest() and len(mixed) == 73
    stream = Stream(broken, 0, 8, 16, 0, 1)
    items = dict(stream.next(64))
    for position, item in items.items():
        member, i = stream.sample(position)
        assert isinstance(item, Damage) == (member == 1)
        shard, key = stream.locate(position)
        name, own = broken.sets[member].locate(i)
        assert (shard, key) == (f"{broken.sets[member].place.rstrip('/')}/{name}", own)
    assert f"{tmp_path / 'b'}/shard-000000.tar" in broken.shards_read
    assert broken.shards_read == {stream.locate(position)[0] for position in items}


def parsed(train: Any) -> config.Config:
    return config.parse({"model": {"path": "-"}, "data": {"train": train}}, "x.yaml")


def test_settings_of_a_mixture(tmp_path: Path) -> None:
    assert parsed("shards/rec").data.sources == (("shards/rec", 1.0),)
    two = parsed([{"path": "a", "weight": 3}, {"path": "b"}])
    assert two.data.sources == (("a", 3.0), ("b", 1.0))
    assert config.parse_saved(two.model_dump(mode="json"), "saved") == (two, [])
    (tmp_path / "c.yaml").write_text(config.dump(two))
    assert config.load(tmp_path / "c.yaml") == two
    words = ["data.train=[{path: c, weight: 2}, {path: d}]"]
    assert config.load(tmp_path / "c.yaml", words).data.sources == (("c", 2.0), ("d", 1.0))
    assert config.load(tmp_path / "c.yaml", ["data.train=e"]).data.sources == (("e", 1.0),)


@pytest.mark.parametrize(
    ("train", "says"),
    [
        (5, "data.train: Input should be a valid string"),
        ([], "data.train: List should have at least 1 item after validation, not 0"),
        (["a"], "data.train.0: Input should be a valid dictionary or instance of SourceConfig"),
        ([{"weight": 1}], "data.train.0.path: Field required"),
        ([{"path": "a", "weight": 0}], "data.train.0.weight: Input should be greater than 0"),
        ([{"path": "a", "wieght": 2}], "unknown key data.train.0.wieght; did you mean data.train.0.weight?"),
        ([{"path": "a", "weight": float("inf")}], "data.train.0.weight: Input should be a finite number"),
    ],
)
def test_wrong_settings_are_one_line(train: Any, says: str) -> None:
    with pytest.raises(ValueError, match=f"^x.yaml: {says.replace('?', '[?]')}") as caught:
        parsed(train)
    assert "\n" not in str(caught.value)


def test_empty_sets_are_named(places: list[Path], tmp_path: Path) -> None:
    empty = ShardSet(tmp_path, [])
    with pytest.raises(ValueError, match=f"^{tmp_path}: the shards hold no samples$"):
        Mixture([ShardSet.open(places[0]), empty], [1.0, 1.0])
