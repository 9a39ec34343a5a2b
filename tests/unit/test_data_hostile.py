"""Input made to break the reader: headers of tars that never end, rows of wrong types, pipes in place of shards."""

from __future__ import annotations

import io
import json
import os
import socket
import struct
import tarfile
from pathlib import Path
from typing import Any

import pytest

from megatron_vlmr1 import config
from megatron_vlmr1.cli.main import main
from megatron_vlmr1.data import handover
from megatron_vlmr1.data.building import coco, refcoco
from megatron_vlmr1.data.images import ImageProcessor
from megatron_vlmr1.data.index import ShardSet
from megatron_vlmr1.data.mixture import Mixture
from megatron_vlmr1.data.order import turns
from megatron_vlmr1.data.prefetch import Bounds, Prefetcher
from megatron_vlmr1.data.rows import BadRow, from_object
from megatron_vlmr1.data.scan import scan
from megatron_vlmr1.data.shards import build
from megatron_vlmr1.data.stream import Stream
from megatron_vlmr1.types import Damage

GOOD = json.dumps({"question": "q", "answer": "a"}).encode()


def header(size: bytes, kind: bytes = tarfile.REGTYPE, name: str = "bad.json") -> bytes:
    member = tarfile.TarInfo(name)
    member.type = kind
    raw = bytearray(member.tobuf(tarfile.USTAR_FORMAT))
    raw[124:136] = size.ljust(12, b"\0")
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    return bytes(raw)


def members(*names: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(GOOD)
            archive.addfile(member, io.BytesIO(GOOD))
    return out.getvalue()


def big(size: int) -> bytes:
    return (b"\xff" * 4 if size < 0 else b"\x80" + bytes(3)) + struct.pack(">q", size)


def pax(text: bytes) -> bytes:
    return header(b"%011o" % len(text), tarfile.XHDTYPE) + text.ljust(-(-len(text) // 512) * 512, b"\0")


LINK = header(b"%011o" % 5, tarfile.GNUTYPE_LONGNAME) + b"abcde".ljust(512, b"\0")


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    ("bad", "after"),  # what stands between two samples, and whether the second is still found
    [
        (header(big(-512)), True),  # tarfile before 3.11.14 reads the same header for ever
        (header(big(-1024)), True),
        (header(big(2**62)), True),
        (header(big(10**12), tarfile.XHDTYPE), True),
        (header(big(10**12), tarfile.GNUTYPE_LONGNAME), True),
        (pax(b"14 size=-5120\n"), True),
        (pax(b"12 size=xyz\n"), True),
        (pax(b"9" * 10_000), True),
        (LINK * 1500, False),
        (header(b"%011o" % 5, tarfile.GNUTYPE_SPARSE), True),
    ],
    ids=lambda value: None if isinstance(value, bool) else str(len(value)),
)
def test_no_header_hangs_or_breaks_the_scan(bad: bytes, after: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(members("a.json")[:1024] + bad + members("b.json", "c.json"))
    found = scan(path)
    keys = [found.index.key(i) for i in range(len(found.index))]
    assert keys[0] == "a" and ("c" in keys) == after
    assert found.gaps or found.ignored or keys == ["a", "b", "c"]


def test_a_pipe_in_place_of_a_shard_is_damage(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(GOOD + b"\n")
    build([tmp_path / "rows.jsonl"], [tmp_path], tmp_path / "shards", shard_bytes=10_000)
    (tmp_path / "shards" / "shard-000000.tar").unlink()
    os.mkfifo(tmp_path / "shards" / "shard-000000.tar")
    lost = ShardSet.open(tmp_path / "shards").read(0)
    assert isinstance(lost, Damage) and "beyond the end" in lost.reason
    with pytest.raises(ValueError, match="not a file"):
        scan(tmp_path / "shards" / "shard-000000.tar")


@pytest.mark.parametrize("verb", ["index", "verify", "inspect"])
@pytest.mark.parametrize("place", ["http://host/shards", "pipe:x"])
def test_commands_on_shards_refuse_urls(verb: str, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", verb, place]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"vlmr1: error: {place}: ")


def test_a_sheet_needs_a_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", "inspect", str(tmp_path), "--sheet", "."]) == 2
    assert capsys.readouterr().err == "vlmr1: error: --sheet .: not the name of a file\n"


def test_a_killed_worker_may_have_been_asked_for_more_than_a_channel_holds(tmp_path: Path) -> None:
    lines = (json.dumps({"question": f"q{i}", "answer": "1"}) + "\n" for i in range(900))
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    build([tmp_path / "rows.jsonl"], [tmp_path], tmp_path / "shards", shard_bytes=10**7)
    stream = Stream(Mixture.open([(str(tmp_path / "shards"), 1.0)]), 1, 8, 16, 0, 1)
    reader = Prefetcher(stream, "tests.data_worker", b"", Bounds(1, 800, 1 << 40, 1, 60.0))
    try:
        items = reader.read(stream.take(1))
        for _ in range(3):
            reader._ask()
            os.kill(reader.pids[0], 9)
            items += reader.read(stream.take(100))
    finally:
        reader.close()
    assert [item[0].position for item in items if not isinstance(item, Damage)] == list(range(301))


def test_signs_of_life_never_wait_for_a_busy_rank() -> None:
    rank, worker = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with rank, worker:
        for _ in range(5000):
            handover.say_busy(worker)
        assert handover.receive(rank) == (handover.BUSY, 0, b"", None)


def test_weights_whose_sum_is_beyond_numbers() -> None:
    assert turns((1e308, 1e308)) == (1, 1) and turns((5e-324, 5e-324)) == (1, 1)
    with pytest.raises(ValueError, match=r"data.train: weight 1e\+300 is less than one part"):
        turns((1e308, 1e308, 1e300))


def document(**other: Any) -> dict[str, Any]:
    found = {"image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5]}
    parts = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [found]}
    return {**parts, "categories": [{"id": 1, "name": "cat"}], **other}


def reasons(doc: dict[str, Any]) -> list[str]:
    return [row for _, row in coco.rows(doc, Path("x"), None, False) if isinstance(row, str)]


def test_coco_images_without_an_id_of_their_own_are_not_empty_pictures() -> None:
    assert reasons(document()) == []
    twice = [{"id": 1, "file_name": "a.jpg"}, {"id": 1, "file_name": "b.jpg"}]
    assert reasons(document(images=twice)) == ["the id 1 is no whole number or text, or a later image has it too"]
    for bad in (None, [1], 1.5):
        (why,) = reasons(document(images=[{"id": bad, "file_name": "a.jpg"}], annotations=[]))
        assert why.startswith(f"the id {bad!r} is no whole number")
    (why,) = reasons(document(annotations=[{"image_id": 1, "category_id": 1, "bbox": [10**400, 1.5, 2.5, 5]}]))
    assert why == "annotation 1: the bbox has numbers that are too large"


def test_an_empty_image_is_not_a_row_without_one() -> None:
    entry = {"image": None, "sentence": "x", "bbox": [1, 1, 5, 5]}
    assert list(refcoco.rows([entry], Path("x"), None, "xyxy")) == [(1, "image is empty")]
    with pytest.raises(BadRow, match="answer holds an empty value"):
        from_object({"question": "q", "answer": [1, 2, 3, None]})


@pytest.mark.parametrize("name", ["a/b", "", "..\n", "x y", "é", "a" * 101])
def test_names_of_splits_fit_into_file_names(name: str) -> None:
    raw = {"model": {"path": "-"}, "data": {"train": "x", "evaluate": {name: "y"}}}
    with pytest.raises(ValueError, match=r"^x.yaml: data.evaluate: split .* letters, digits, _ . and - only") as caught:
        config.parse(raw, "x.yaml")
    assert "\n" not in str(caught.value)
    raw["data"]["evaluate"] = {"A_b.c-9": "y"}  # type: ignore[index]
    assert config.parse(raw, "x.yaml").data.evaluate == {"A_b.c-9": "y"}


@pytest.mark.parametrize("raw", [{"resample": 99}, {"image_std": [0.5, 0, 0.5]}, {"rescale_factor": "x"}])
def test_a_processor_that_would_lose_every_image_is_refused(raw: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="preprocessor_config.json: "):
        ImageProcessor.from_pretrained(tmp_path)
