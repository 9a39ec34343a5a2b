"""Shards made elsewhere and indexes made anew: what is a sample, what is left alone, and what damage costs."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest

from megatron_vlmr1.data import index
from megatron_vlmr1.data.index import ShardSet, verify
from megatron_vlmr1.data.repair import lost, repair
from megatron_vlmr1.data.scan import scan
from megatron_vlmr1.data.shards import build
from megatron_vlmr1.types import Damage, Sample
from tests.tiny import compressed, picture

JPEG = compressed(picture(30, 20))
COUNT = 9


def record(i: int) -> bytes:
    return json.dumps({"question": f"q{i}", "answer": f"a{i}", "level": i}).encode()


def write_tar(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def samples(directory: Path) -> list[Sample]:
    shards = ShardSet.open(directory)
    return [item for item in map(shards.read, range(len(shards))) if isinstance(item, Sample)]


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """Nine samples of three members each."""
    names = [(f"a.b/{i:04d}", i) for i in range(COUNT)]
    members = [(f"{k}.{s}", d) for k, i in names for s, d in (("json", record(i)), ("0.jpg", JPEG), ("1.PNG", JPEG))]
    write_tar(tmp_path / "x-0.tar", members)
    return tmp_path


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_shards_made_elsewhere(form: int, tmp_path: Path) -> None:
    long = "folder/" * 20 + "long"
    turns = {"conversations": [{"from": "human", "value": "<image>c"}, {"from": "gpt", "value": "<answer>d</answer>"}]}
    members = [
        ("./dir.x/one.json", record(1)),
        ("./dir.x/one.jpg", JPEG),
        ("./dir.x/one.cls", b"3"),
        ("two.jpeg", JPEG),
        ("two.json", json.dumps(turns).encode()),
        ("three.JSON", json.dumps({"question": "e", "solution": "f", "extra": {"g": 1}}).encode()),
        ("three.10.png", JPEG),
        ("three.2.WEBP", JPEG),
        ("three.png.pkl", b"x"),
        ("image-only.jpg", JPEG),
        ("no-truth.json", b'{"caption": "h"}'),
        *([] if form == tarfile.USTAR_FORMAT else [(f"{long}.json", record(4))]),
    ]
    write_tar(tmp_path / "x.tar", members, form)
    (row,) = repair(tmp_path)
    more = form != tarfile.USTAR_FORMAT
    assert row == {
        **{"shard": "x.tar", "why": "its index was missing", "expected": None, "samples": 4 + more},
        **{"ignored": 2, "without_json": 1, "gaps": [], "damaged": []},
    }
    assert not lost(row) and repair(tmp_path) == []
    found = samples(tmp_path)
    assert [(item.key, item.question, item.solution, len(item.images)) for item in found[:3]] == [
        ("dir.x/one", "q1", "a1", 1),
        ("two", "c", "d", 1),
        ("three", "e", "f", 2),
    ]
    assert [dict(item.extra) for item in found[:3]] == [{"level": 1}, {}, {"g": 1}]
    assert not more or found[3].key == long
    (damaged,) = verify(tmp_path)["damaged"]
    assert damaged["key"] == "no-truth" and "conversations must be" in damaged["reason"]


def test_standard_webdataset_and_we_see_the_same(foreign: Path) -> None:
    import webdataset

    repair(foreign)
    theirs = list(webdataset.WebDataset(str(foreign / "x-0.tar"), shardshuffle=False))
    assert [item["__key__"] for item in theirs] == [item.key for item in samples(foreign)]
    assert [item["0.jpg"] for item in theirs] == [item.images[0] for item in samples(foreign)]


def test_hostile_members_are_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    hostile = [("../up.json", record(0)), ("/etc/abs.json", record(0)), ("a/../b.json", record(0)), ("x.pkl", b"cos\n")]
    write_tar(folder / "x.tar", [*hostile, ("good.json", record(1)), ("good.json", record(2))])
    with tarfile.open(folder / "x.tar", "a") as archive:
        for kind, name in ((tarfile.SYMTYPE, "l.json"), (tarfile.LNKTYPE, "h.json"), (tarfile.FIFOTYPE, "p.json")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    (row,) = repair(folder)
    assert (row["samples"], row["ignored"], row["gaps"]) == (1, 8, [])
    assert [(item.key, item.question) for item in samples(folder)] == [("good", "q1")]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["in", "x.index", "x.tar"]


def members_of(tar: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(tar) as archive:
        return archive.getmembers()


def flip(data: bytearray, at: int) -> None:
    data[at] ^= 0xFF


def zero(data: bytearray, begin: int, end: int) -> None:
    data[begin:end] = bytes(end - begin)


def cut(data: bytearray, at: int) -> None:
    del data[at:]


# Damage before there is an index: (what is done, members as m; keys that are never delivered; keys that nothing names).
DAMAGE: dict[str, tuple[Any, set[int], set[int]]] = {
    "header of a json": (lambda d, m: flip(d, m[12].offset + 100), {3, 4}, set()),
    "header of the first picture": (lambda d, m: flip(d, m[13].offset + 100), {4}, set()),
    "header of the last picture": (lambda d, m: flip(d, m[14].offset + 100), {4, 5}, set()),
    "the first header": (lambda d, m: flip(d, 100), {0}, set()),
    "a whole sample zeroed": (lambda d, m: zero(d, m[12].offset, m[15].offset), {3, 5}, {4}),
    "two samples zeroed": (lambda d, m: zero(d, m[12].offset, m[18].offset), {3, 6}, {4, 5}),
    "a zeroed block of a header": (lambda d, m: zero(d, m[13].offset, m[13].offset + 512), {4}, set()),
    "cut within a picture": (lambda d, m: cut(d, m[14].offset_data + 10), {4}, {5, 6, 7, 8}),
    "cut between samples": (lambda d, m: cut(d, m[15].offset), {4}, {5, 6, 7, 8}),
    "cut within a header": (lambda d, m: cut(d, m[15].offset + 100), {4}, {5, 6, 7, 8}),
    "garbage behind": (lambda d, m: d.extend(os.urandom(5000)), {8}, set()),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_before_there_is_an_index_is_never_silent(name: str, foreign: Path) -> None:
    tar = foreign / "x-0.tar"
    damage, named, unnamed = DAMAGE[name]
    data = bytearray(tar.read_bytes())
    damage(data, members_of(tar))
    tar.write_bytes(data)
    (row,) = repair(foreign)
    assert lost(row) and row["gaps"] and sorted(row["damaged"]) == [f"a.b/{i:04d}" for i in sorted(named)]
    report = verify(foreign)
    assert {entry["key"] for entry in report["damaged"]} == {f"a.b/{i:04d}" for i in named}
    assert report["indexed"] == COUNT - len(unnamed) == report["delivered"] + len(named)
    assert {item.key for item in samples(foreign)} == {f"a.b/{i:04d}" for i in range(COUNT) if i not in named | unnamed}
    assert all(len(item.images) == 2 for item in samples(foreign))


@pytest.mark.parametrize("content", [b"", b"\0" * 10240, b"garbage" * 5000, os.urandom(20_000)])
def test_a_tar_without_a_sample_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(ValueError, match=r"x.tar: no sample .* can be read in it") as caught:
        repair(tmp_path)
    assert "\n" not in str(caught.value) and [path.name for path in tmp_path.iterdir()] == ["x.tar"]


def test_wrong_directories(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such directory of shards"):
        repair(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"holds no \.tar files"):
        repair(tmp_path)


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    rows = []
    for i in range(24):
        (tmp_path / f"{i}.jpg").write_bytes(compressed(picture(40 + i, 30, seed=i)))
        turns = [{"from": "human", "value": f"q{i}"}, {"from": "gpt", "value": "a"}]
        rows.append(json.dumps({"image": f"{i}.jpg", "conversations": turns}))
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    build([tmp_path / "rows.jsonl"], [tmp_path], tmp_path / "out", 15_000)
    return tmp_path / "out"


def test_a_repaired_index_is_the_one_that_was(ours: Path) -> None:
    before = {path.name: path.read_bytes() for path in ours.iterdir()}
    (ours / "shard-000000.index").unlink()
    (ours / "shard-000001.index").write_bytes(b"damaged")
    seen: list[tuple[int, int]] = []
    changed = repair(ours, lambda done, total: seen.append((done, total)))
    assert [(row["shard"], row["why"]) for row in changed] == [
        ("shard-000000.tar", "its index was missing"),
        ("shard-000001.tar", "its index was damaged"),
    ]
    assert all(row["expected"] == row["samples"] > 0 and not lost(row) for row in changed)
    assert {path.name: path.read_bytes() for path in ours.iterdir()} == before and seen[-1][0] == seen[-1][1] >= 3


def test_samples_that_a_repair_cannot_find_are_missed(ours: Path) -> None:
    tar = ours / "shard-000001.tar"
    data = bytearray(tar.read_bytes())
    found = members_of(tar)
    tar.write_bytes(data[: found[4].offset])
    index.index_path(tar).unlink()
    (row,) = repair(ours)
    assert row["expected"] == len(found) // 2 and row["samples"] == 2 and len(row["damaged"]) == 1 and lost(row)
    shards = ShardSet.open(ours)
    assert sum(isinstance(shards.read(i), Damage) for i in range(len(shards))) == 1


def test_a_large_tar_is_scanned_in_little_memory(tmp_path: Path) -> None:
    import tracemalloc

    write_tar(tmp_path / "x.tar", [("a.json", record(1)), ("a.jpg", bytes(60_000_000))])
    tracemalloc.start()
    assert len(scan(tmp_path / "x.tar").index) == 1
    assert tracemalloc.get_traced_memory()[1] < 8_000_000
    tracemalloc.stop()
    shutil.rmtree(tmp_path)
