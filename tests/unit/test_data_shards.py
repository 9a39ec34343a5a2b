"""Shards: built alike every time, read by webdataset, bad rows left out, damage named exactly."""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_vlmr1.data import index
from megatron_vlmr1.data.building.sources import Source
from megatron_vlmr1.data.index import Progress, ShardIndex, ShardSet, verify
from megatron_vlmr1.data.inspect import inspect
from megatron_vlmr1.data.scan import scan
from megatron_vlmr1.data.shards import build, build_from
from megatron_vlmr1.types import Damage, Sample
from tests.tiny import compressed, picture

KINDS = (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"))


def row(i: int, **other: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>Where is thing {i}?"}, {"from": "gpt", "value": f"[0, 1, {i + 2}, 4]"}]
    return {"id": i, "conversations": turns, **other}


def write(path: Path, rows: list[dict[str, Any] | bytes]) -> Path:
    path.write_bytes(b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows))
    return path


def source(directory: Path, count: int = 24) -> tuple[Path, Path]:
    """Rows with no, one and two images, of all formats."""
    root = directory / "images"
    root.mkdir(parents=True)
    rows: list[dict[str, Any] | bytes] = []
    for i in range(count):
        kind, suffix = KINDS[i % 3]
        (root / f"{i}.img").write_bytes(compressed(picture(40 + i, 30, seed=i), kind))
        image = {0: None, 1: [f"{i}.img", f"{i - 1}.img"]}.get(i % 8, f"{i}.img")
        rows.append(row(i, **({} if image is None else {"image": image})))
    return write(directory / "rows.jsonl", rows), root


@pytest.fixture
def built(tmp_path: Path) -> Path:
    jsonl, root = source(tmp_path)
    summary = build([jsonl], [root], tmp_path / "out", shard_bytes=20_000)
    assert summary["samples"] == 24 and summary["images"] == 24 and summary["rejected"] == 0
    assert summary["shards"] == len(ShardSet.open(tmp_path / "out").names) >= 4
    return tmp_path / "out"


def test_samples_come_back_as_they_were(built: Path) -> None:
    shards = ShardSet.open(built)
    assert len(shards) == 24 and shards.shards_read == set()
    for i in range(24):
        sample = shards.read(i)
        assert isinstance(sample, Sample)
        assert (sample.question, sample.solution) == (f"Where is thing {i}?", f"[0, 1, {i + 2}, 4]")
        assert sample.extra == {"id": i}
        files = [] if i % 8 == 0 else [i, i - 1] if i % 8 == 1 else [i]
        assert sample.images == tuple((built.parent / f"images/{file}.img").read_bytes() for file in files)
        assert shards.locate(i)[1] == sample.key
    assert shards.shards_read == set(shards.names)


def test_webdataset_reads_our_shards(built: Path) -> None:
    import webdataset

    shards = ShardSet.open(built)
    urls = [str(built / name) for name in shards.names]
    read = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(read) == 24
    for i, found in enumerate(read):
        ours = shards.read(i)
        assert isinstance(ours, Sample)
        assert found["__key__"] == ours.key
        assert json.loads(found["json"]) == {"question": ours.question, "solution": ours.solution, "extra": ours.extra}
        images = {name: data for name, data in found.items() if name[0].isdigit()}
        assert tuple(images[name] for name in sorted(images)) == ours.images
        assert {name.split(".")[1] for name in images} <= {"jpg", "png", "webp"}


def test_the_same_input_gives_the_same_bytes(built: Path, tmp_path: Path) -> None:
    build([tmp_path / "rows.jsonl"], [tmp_path / "images"], tmp_path / "again", shard_bytes=20_000)
    names = sorted(path.name for path in built.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    assert all((built / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)
    assert ShardSet.open(built).digest() == ShardSet.open(tmp_path / "again").digest()
    other = build([tmp_path / "rows.jsonl"], [tmp_path / "images"], tmp_path / "other", shard_bytes=10_000)
    assert other["samples"] == 24 and ShardSet.open(tmp_path / "other").digest() != ShardSet.open(built).digest()


def test_index_agrees_with_tarfile(built: Path) -> None:
    for tar in sorted(built.glob("*.tar")):
        table = index.read_index(index.index_path(tar))
        with tarfile.open(tar) as archive:
            members = [member for member in archive if member.isreg()]
            content = {m.offset_data: (m.size, hashlib.sha256(archive.extractfile(m).read()).digest()) for m in members}  # type: ignore[union-attr]
        ours = zip(table.offsets.tolist(), table.sizes.tolist(), table.sha256, strict=True)
        assert {offset: (size, digest.tobytes()) for offset, size, digest in ours} == content
        assert tar.stat().st_size <= 20_000 + tarfile.RECORDSIZE
        assert all((m.mtime, m.uid, m.gid, m.uname) == (0, 0, 0, "vlmr1") for m in members)


def test_more_than_ten_images_keep_their_order(tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(12)]
    for i, name in enumerate(names):
        (tmp_path / name).write_bytes(compressed(picture(16, 16, seed=i), "PNG"))
    build([write(tmp_path / "r.jsonl", [row(0, image=names)])], [tmp_path], tmp_path / "out", 10**6)
    sample = ShardSet.open(tmp_path / "out").read(0)
    assert isinstance(sample, Sample)
    assert sample.images == tuple((tmp_path / name).read_bytes() for name in names)


def test_several_sources_and_extra_keys(tmp_path: Path) -> None:
    rows: list[dict[str, Any] | bytes] = []
    for i in range(2):
        folder = tmp_path / f"images{i}"
        folder.mkdir()
        (folder / "same.png").write_bytes(compressed(picture(20, 20, seed=i), "PNG"))
        rows.append(
            row(i, image="same.png", accu_reward_method="iou", completion="<think> </think>", nested={"a": [1]})
        )
    paths = [write(tmp_path / f"{i}.jsonl", [rows[i]]) for i in range(2)]
    build(paths, [tmp_path / "images0", tmp_path / "images1"], tmp_path / "out", 10**6)
    shards = ShardSet.open(tmp_path / "out")
    for i in range(2):
        sample = shards.read(i)
        assert isinstance(sample, Sample)
        assert sample.images == ((tmp_path / f"images{i}/same.png").read_bytes(),)
        assert dict(sample.extra) == {
            key: value for key, value in rows[i].items() if key not in ("image", "conversations")
        }


def test_bad_rows_go_to_the_ledger(tmp_path: Path) -> None:
    jsonl, root = source(tmp_path, 8)
    lines = jsonl.read_bytes().splitlines()
    bad: list[dict[str, Any] | bytes] = [*lines[:3], b"", b"{broken", *lines[3:], row(9, image="../x.png")]
    write(jsonl, bad)
    summary = build([jsonl], [root], tmp_path / "out", 10**6, max_rejected_frac=0.2)
    assert (summary["samples"], summary["rejected"]) == (8, 2)
    ledger = [json.loads(line) for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
    assert [(entry["file"], entry["line"]) for entry in ledger] == [(str(jsonl), 5), (str(jsonl), 13 - 2)]
    assert "not JSON" in ledger[0]["reason"] and "must be relative" in ledger[1]["reason"]
    with pytest.raises(
        ValueError, match=r"rows.jsonl:5: not JSON.*first of 2 bad rows in 10; --max-rejected 0.20 would"
    ):
        build([jsonl], [root], tmp_path / "none", 10**6, max_rejected_frac=0.19)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "out", "rows.jsonl"]


def test_wrong_inputs_are_one_line_and_leave_nothing(tmp_path: Path) -> None:
    jsonl, root = source(tmp_path, 2)
    empty = write(tmp_path / "empty.jsonl", [b" "])
    (tmp_path / "taken").mkdir()
    cases = [
        (([], [], tmp_path / "o"), "no source of rows"),
        (([jsonl], [], tmp_path / "o"), "1 jsonl files but 0 image folders"),
        (([tmp_path / "x.jsonl"], [root], tmp_path / "o"), "x.jsonl: no such jsonl"),
        (([jsonl], [tmp_path / "x"], tmp_path / "o"), "x: no such image folder"),
        (([empty], [root], tmp_path / "o"), "empty.jsonl: no rows"),
        (([jsonl], [root], tmp_path / "taken"), "taken: exists already"),
        (([jsonl], [root], jsonl / "o"), "rows.jsonl: not a directory"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for (paths, roots, out), message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            build(paths, roots, out, 10**6)
        assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    jsonl, root = source(tmp_path, 5)
    seen: list[tuple[str, int, int]] = []

    @contextmanager
    def bars(title: str) -> Iterator[Progress]:
        yield lambda done, total: seen.append((title, done, total))

    build_from([Source("jsonl", jsonl, root)] * 2, tmp_path / "out", 5_000, bars=bars)
    reading = [row for row in seen if row[0] == "reading rows"]
    assert reading == [("reading rows", n * jsonl.stat().st_size, 2 * jsonl.stat().st_size) for n in (1, 2)]
    writing = [row for row in seen if row[0] == "writing shards"]
    assert len(writing) >= 3 and writing == sorted(writing) and writing[-1][1] == writing[-1][2]


def damage(name: str, directory: Path) -> set[str]:
    """Damage the second shard and return the keys that are lost by it."""
    tar = sorted(directory.glob("*.tar"))[1]
    table = index.read_index(index.index_path(tar))
    keys = [table.key(i) for i in range(len(table))]
    first = [int(table.offsets[m]) for m in table.starts[:-1]]
    data = bytearray(tar.read_bytes())
    victim = len(keys) // 2
    lost = {keys[victim]}
    if name == "flipped":
        data[first[victim] + 5] ^= 1
    elif name == "flipped header":
        data[first[victim] - 300] ^= 255
        lost = set()
    elif name == "zeroed":
        data[first[victim] : first[victim] + 10] = bytes(10)
    elif name == "zeroed block":
        begin = first[victim] - 512
        data[begin : begin + 4096] = bytes(4096)
        lost = {
            keys[row]
            for row in range(len(keys))
            for m in range(int(table.starts[row]), int(table.starts[row + 1]))
            if int(table.offsets[m]) < begin + 4096 and int(table.offsets[m] + table.sizes[m]) > begin
        }
    elif name == "longer":
        data += b"more" * 1000
        lost = set()
    elif name == "every header":
        for member in table.offsets.tolist():
            data[member - 512 : member] = bytes(512)
        lost = set()
    elif name == "truncated":
        ends = table.offsets + table.sizes
        del data[int(ends[int(table.starts[victim])]) - 1 :]
        spans = zip(keys, table.starts[:-1], table.starts[1:], strict=True)
        lost = {key for key, begin, end in spans if any(int(ends[m]) > len(data) for m in range(begin, end))}
    elif name in ("empty", "garbage"):
        data = bytearray() if name == "empty" else bytearray(np.random.default_rng(0).bytes(len(data)))
        lost = set(keys)
    tar.write_bytes(data)
    if name == "absent":
        tar.unlink()
        lost = set(keys)
    return lost


@pytest.mark.parametrize(
    "name",
    [
        *("flipped", "flipped header", "every header", "zeroed", "zeroed block"),
        *("truncated", "longer", "empty", "garbage", "absent"),
    ],
)
def test_damage_is_named_exactly(name: str, built: Path) -> None:
    lost = damage(name, built)
    report = verify(built)
    assert {entry["key"] for entry in report["damaged"]} == lost
    assert (report["indexed"], report["delivered"]) == (24, 24 - len(lost))
    assert all(entry["reason"] and entry["shard"] == "shard-000001.tar" for entry in report["damaged"])
    shards = ShardSet.open(built)
    read = [shards.read(i) for i in range(24)]
    assert {item.key for item in read if isinstance(item, Damage)} == lost
    found = inspect(built)
    assert (found["samples"], found["damaged"]) == (24, len(lost))


def test_an_index_must_be_there_and_whole(built: Path, tmp_path: Path) -> None:
    path = built / "shard-000001.index"
    whole = path.read_bytes()
    for content in (b"", b"{}\n", whole[:-1], whole[:300] + b"x" + whole[301:], whole.replace(b"-1", b"-9", 1)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="shard-000001.index: not a valid shard index") as caught:
            ShardSet.open(built)
        assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(ValueError, match="shard-000001.index: missing"):
        ShardSet.open(built)
    (built / "shard-000001.tar").unlink()
    with pytest.raises(ValueError, match="shard-000001.index: missing"):
        ShardSet.open(built)  # the manifest still names it
    (built / "shards.json").write_text('{"shards": ["../x.tar"]}')
    with pytest.raises(ValueError, match="shards.json: not a manifest"):
        ShardSet.open(built)
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match="holds no shards"):
        ShardSet.open(tmp_path / "bare")
    with pytest.raises(ValueError, match="no such directory"):
        ShardSet.open(tmp_path / "nowhere")


def test_an_index_that_lies_reads_nothing_else(built: Path) -> None:
    path = built / "shard-000000.index"
    table = index.read_index(path)
    lies = {name: getattr(table, name).copy() for name in ("offsets", "sizes")}
    lies["offsets"][0] = 2**63
    lies["sizes"][int(table.starts[2])] = 2**62
    fields = {name: getattr(table, name) for name in ("shard", "starts", "kinds", "key_ends", "keys", "sha256")}
    index.write_index(ShardIndex(**fields, **lies), path)
    shards = ShardSet.open(built)
    for i in (0, 2):
        item = shards.read(i)
        assert isinstance(item, Damage) and "beyond the end" in item.reason


def test_only_known_members_are_indexed(tmp_path: Path) -> None:
    import io

    tar = tmp_path / "x.tar"
    record = json.dumps({"question": "q", "solution": "s", "extra": {}}).encode()
    names = ["../up.json", "/etc/abs.json", "a.pkl", "a.json", "a.0.jpg", "a.0.gif", "b.json", "b.0.pyd"]
    with tarfile.open(tar, "w") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(record)
            archive.addfile(member, io.BytesIO(record))
        link = tarfile.TarInfo("c.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    index.write_index(scan(tar).index, index.index_path(tar))
    before = sorted(tmp_path.iterdir())
    shards = ShardSet.open(tmp_path)
    items = [shards.read(i) for i in range(len(shards))]
    assert [(item.key, len(item.images)) for item in items if isinstance(item, Sample)] == [
        ("a", 1),
        ("b", 0),
    ]
    assert sorted(tmp_path.iterdir()) == before


def test_a_member_that_is_no_sample_is_damage(tmp_path: Path) -> None:
    import io

    tar = tmp_path / "x.tar"
    bodies = [b"{}", b"[]", b"nonsense", b'{"question": 1, "solution": "s", "extra": {}}', b"[" * 100_000]
    with tarfile.open(tar, "w") as archive:
        for i, body in enumerate(bodies):
            member = tarfile.TarInfo(f"{i}.json")
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
    index.write_index(scan(tar).index, index.index_path(tar))
    assert len(verify(tmp_path)["damaged"]) == len(bodies)


def test_inspect_counts(built: Path) -> None:
    found = inspect(built)
    assert (found["samples"], found["images"], found["damaged"]) == (24, 24, 0)
    assert found["images_per_sample"] == {"0": 3, "1": 18, "2": 3}
    assert sum(found["formats"].values()) == 24 and set(found["formats"]) == {"JPEG", "PNG", "WEBP"}
    widths = [40 + file for i in range(24) for file in ([] if i % 8 == 0 else [i, i - 1] if i % 8 == 1 else [i])]
    pixels = sorted(30 * width for width in widths)
    assert found["pixels"] == {"min": pixels[0], "median": int(np.median(pixels)), "max": pixels[-1]}
    assert found["longer_side"][0] == {"upto": 112, "images": 24}
    assert found["area"][0] == {"upto": 112 * 112, "images": 24} and found["unreadable"] == 0
    assert [row for row in found["question_chars"] if row["samples"]] == [{"upto": 32, "samples": 24}]  # 17 or 18
    assert found["solution_chars"][0] == {"upto": 16, "samples": 24} and found["methods"] == {}
    assert found["bytes"] == sum(path.stat().st_size for path in built.glob("*.tar"))
    shutil.rmtree(built)
    with pytest.raises(ValueError, match="no such directory"):
        inspect(built)
