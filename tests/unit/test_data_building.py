"""Building shards: every kind of source, boxes, several processes, and what an interruption leaves."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megatron_vlmr1.data import boxes
from megatron_vlmr1.data.building import sources, writer
from megatron_vlmr1.data.building.sources import Source
from megatron_vlmr1.data.index import ShardSet
from megatron_vlmr1.data.rows import METHOD, BadRow, Row
from megatron_vlmr1.data.shards import build, build_from
from megatron_vlmr1.types import Sample
from tests.tiny import compressed, picture

WIDTH, HEIGHT = 60, 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight pictures of 60 x 40 pixels."""
    (tmp_path / "images").mkdir()
    for i in range(8):
        (tmp_path / f"images/{i}.jpg").write_bytes(compressed(picture(WIDTH, HEIGHT, seed=i)))
    return tmp_path


def write_json(path: Path, document: Any) -> Path:
    path.write_text(json.dumps(document))
    return path


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def vlm_row(question: str, answer: Any, image: Any = None, **other: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **({} if image is None else {"image": image}), **other}


def built(out: Path, *what: Source, **options: Any) -> list[Sample]:
    build_from(what, out, options.pop("shard_bytes", 10**7), options.pop("max_rejected_frac", 0.9), **options)
    shards = ShardSet.open(out)
    items = [shards.read(i) for i in range(len(shards))]
    assert all(isinstance(item, Sample) for item in items)
    return [item for item in items if isinstance(item, Sample)]


def rejected(out: Path) -> list[tuple[int, str]]:
    rows = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    return [(row["line"], row["reason"]) for row in rows]


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


COCO = {
    "categories": [{"id": 1, "name": "cat"}, {"id": 7, "name": "dog"}, {"id": 9, "name": "fox"}],
    "images": [{"id": 10 + i, "file_name": f"{i}.jpg", "width": WIDTH, "height": HEIGHT} for i in range(6)],
    "annotations": [
        {"image_id": 10, "category_id": 7, "bbox": [1, 2, 30, 20.5], "iscrowd": 0},
        {"image_id": 10, "category_id": 1, "bbox": [0.333, 0, 10, 10]},
        {"image_id": 11, "category_id": 1, "bbox": [0, 0, 60, 40], "iscrowd": 1},
        {"image_id": 13, "category_id": 1, "bbox": [50, 0, 20, 10]},  # reaches outside
        {"image_id": 14, "category_id": 1, "bbox": [5, 5, 0, 10]},  # no area
        {"image_id": 15, "category_id": 2, "bbox": [5, 5, 10, 10]},  # no such class
        {"image_id": 99, "category_id": 1, "bbox": [5, 5, 10, 10]},  # no such image
    ],
}


def test_coco(folder: Path) -> None:
    path = write_json(folder / "instances.json", COCO)
    found = built(folder / "out", Source("coco", path, folder / "images"))
    assert [item.extra for item in found] == [{"id": 10}, {"id": 11}, {"id": 12}]
    assert {item.question for item in found} == {"Where is each object of these classes: cat, dog, fox?"}
    assert boxes.of_solution(found[0].solution) == [("dog", (1, 2, 31, 22.5)), ("cat", (0.33, 0, 10.33, 10))]
    assert found[0].solution.startswith("```json\n[") and [item.solution for item in found[1:]] == ["None", "None"]
    assert found[2].images == ((folder / "images/2.jpg").read_bytes(),)
    assert rejected(folder / "out") == [
        (4, "box [50, 0, 70, 10] reaches outside the image of 60 x 40 pixels"),
        (5, "box [5, 5, 5, 15] has no area: expected [x1, y1, x2, y2] with x1 < x2 and y1 < y2"),
        (6, "annotation 6: its category_id 2 is none of the file's categories"),
        (7, "annotation 7: its image_id 99 is none of the file's images"),
    ]
    asked = Source("coco", path, folder / "images", question="Find {classes}.", classes="present")
    assert [item.question for item in built(folder / "present", asked)] == [
        "Find cat, dog.",
        "Find cat, dog, fox.",
        "Find cat, dog, fox.",
    ]


def test_the_detection_rewards_read_what_coco_became(folder: Path) -> None:
    from megatron_vlmr1.rewards import detections

    found = built(folder / "out", Source("coco", write_json(folder / "i.json", COCO), folder / "images"))
    parsed = [detections.parse(item.solution) for item in found]
    assert parsed[0] is not None and [(d.label, d.box) for d in parsed[0]] == boxes.of_solution(found[0].solution)
    assert parsed[1:] == [[], []]


def test_refcoco(folder: Path) -> None:
    entries = [
        {"image": "0.jpg", "problem": "Where is it?", "normal_caption": "it", "solution": [1, 2, 30, 40], "split": "a"},
        {"img_path": "1.jpg", "expression": "the cat", "bbox": [1.5, 2, 30, 40]},
        {"file_name": "2.jpg", "sentences": ["one", {"raw": "Two", "sent": "two"}], "bbox": [1, 2, 30, 30]},
        {"image": "3.jpg", "sentence": "x", "bbox": [20, 10, 30, 30], "bbox_format": "xywh"},
        {"image": "3.jpg", "sentence": "x", "bbox": [20, 10, 20, 30]},  # reversed
        {"image": "3.jpg", "bbox": [1, 2, 3, 4]},
        {"image": "3.jpg", "sentence": "x", "bbox": [1, 2, 3]},
        {"image": "../3.jpg", "sentence": "x", "bbox": [1, 2, 3, 4]},
        7,
    ]
    path = write_json(folder / "refs.json", entries)
    found = built(folder / "out", Source("refcoco", path, folder / "images"))
    asks = "Please provide the bounding box coordinate of the region this sentence describes: "
    assert [item.question for item in found] == ["Where is it?", *(asks + t for t in ("the cat", "one", "Two", "x"))]
    solutions = [json.loads(item.solution) for item in found]
    assert solutions == [[1, 2, 30, 40], [1.5, 2, 30, 40], [1, 2, 30, 30], [1, 2, 30, 30], [20, 10, 50, 40]]
    assert found[0].extra == {"split": "a"}
    assert [line for line, _ in rejected(folder / "out")] == [5, 6, 7, 8, 9]
    assert [reason.split(":")[0] for _, reason in rejected(folder / "out")] == [
        "box [20, 10, 20, 30] has no area",
        "the entry has none of the keys normal_caption, expression, sentence, caption",
        "the bbox [1, 2, 3] is not four numbers",
        "image path '../3.jpg' must be relative, without ..",
        "an entry must be a JSON object",
    ]
    path = write_json(folder / "wide.json", [{"image": "1.jpg", "caption": "the cat", "bbox": [1.5, 2, 30, 30]}])
    asked = Source("refcoco", path, folder / "images", question="See {expression}", box_format="xywh")
    (wide,) = built(folder / "wide", asked)
    assert (wide.question, wide.solution) == ("See the cat", "[1.5, 2, 31.5, 32]")


def test_refcoco_tables(folder: Path) -> None:
    document = {
        "images": COCO["images"],
        "annotations": [{"id": 5, "image_id": 12, "bbox": [10, 10, 20, 20]}, {"id": 6, "image_id": 77}],
        "refs": [
            {"ref_id": 1, "ann_id": 5, "file_name": "COCO_x_1.jpg", "sentences": [{"sent": "a"}, {"sent": "b"}]},
            {"ref_id": 2, "ann_id": 6, "sentences": [{"sent": "a"}]},
            {"ref_id": 3, "ann_id": 8, "sentences": [{"sent": "a"}]},
        ],
    }
    path = write_json(folder / "refs.json", document)
    found = built(folder / "out", Source("refcoco", path, folder / "images", question="{expression}"))
    assert [(item.question, item.solution) for item in found] == [("a", "[10, 10, 30, 30]"), ("b", "[10, 10, 30, 30]")]
    assert found[0].images == ((folder / "images/2.jpg").read_bytes(),)
    assert found[0].extra == {"ref_id": 1, "ann_id": 5}
    assert rejected(folder / "out") == [
        (2, "the image_id 77 is none of the file's images"),
        (3, "its ann_id 8 is none of the file's annotations"),
    ]


def test_parquet(folder: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    data = [(folder / f"images/{i}.jpg").read_bytes() for i in range(8)]
    (folder / "hf/data").mkdir(parents=True)
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    schema = pyarrow.schema([("image", kind), ("question", pyarrow.string()), ("answer", pyarrow.string())])
    rows = [{"image": {"bytes": data[i], "path": "x"}, "question": f"<image>q{i}", "answer": f"a{i}"} for i in range(5)]
    rows[3]["answer"] = " "
    rows[4]["image"] = {"bytes": b"no image", "path": None}
    table = pyarrow.Table.from_pylist(rows, schema)
    parquet.write_table(table, folder / "hf/data/train-00000.parquet", row_group_size=2)
    more = {
        "images": [[{"path": "5.jpg"}, {"bytes": data[6]}], None],
        "problem": ["two", "none"],
        "solution": [[1, 2], [3]],
        "score": [0.5, float("nan")],
        "raw": [b"1", b"2"],
    }
    parquet.write_table(pyarrow.table(more), folder / "hf/data/train-00001.parquet")
    found = built(folder / "out", Source("parquet", folder / "hf", folder / "images", method="mcq"))
    assert [(item.question, item.solution) for item in found] == [
        *((f"q{i}", f"a{i}") for i in range(3)),
        ("two", "[1, 2]"),
        ("none", "[3]"),
    ]
    assert [item.images for item in found] == [(data[0],), (data[1],), (data[2],), (data[5], data[6]), ()]
    assert [dict(item.extra) for item in found[2:]] == [
        {METHOD: "mcq"},
        {METHOD: "mcq", "score": 0.5},
        {METHOD: "mcq", "score": None},
    ]
    assert rejected(folder / "out") == [
        (4, "the truth is empty"),
        (5, "the image in the row: not a JPEG, PNG or WebP image"),
    ]
    (folder / "hf/data/train-00000.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(ValueError, match="train-00000.parquet: not a parquet file"):
        built(folder / "none", Source("parquet", folder / "hf", folder / "images"))


def test_a_missing_pyarrow_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "hf").mkdir()
    (folder / "hf/a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        ValueError, match=r"a.parquet: reading parquet needs pyarrow.*megatron-vlmr1\[parquet\]"
    ) as caught:
        built(folder / "out", Source("parquet", folder / "hf", folder / "hf"))
    assert "\n" not in str(caught.value) and sorted(p.name for p in folder.iterdir()) == ["hf", "images"]


def test_several_sources_each_with_its_reward(folder: Path) -> None:
    first = write_rows(folder / "a.jsonl", [vlm_row("q", "a"), vlm_row("r", "b", **{METHOD: "math"})])
    coco = write_json(folder / "i.json", {**COCO, "annotations": [], "images": COCO["images"][:1]})
    last = write_rows(folder / "b.jsonl", [vlm_row("s", "c")])
    images = folder / "images"
    what = [Source("jsonl", first, images, "mcq"), Source("coco", coco, images, "od_ap"), Source("jsonl", last, images)]
    found = built(folder / "out", *what, max_rejected_frac=0)
    assert [item.extra.get(METHOD) for item in found] == ["mcq", "math", "od_ap", None]


BOXES = {
    "[0, 0, 60, 40]": None,
    "[-1, -0.5, 61, 41]": None,  # rounded over the edge
    "[0, 0, 62, 40]": "outside",
    "[-2, 0, 30, 40]": "outside",
    "[30, 0, 20, 40]": "no area",
    "[30, 20, 40, 20]": "no area",
    "[0, 0, 1e999, 40]": "not finite",
    "[0, 0, NaN, 40]": "not finite",
    '[{"bbox_2d": [0, 0, 90, 40], "label": "x"}]': "outside",
    '```json\n[{"bbox_2d": [0, 0, 9, 4], "label": "x"}, {"bbox_2d": [0, 0, 9, 44], "label": "y"}]\n```': "outside",
    '{"bbox_2d": [0, 0, 9], "label": "x"}': "not four numbers",
    '{"bbox_2d": [0, 0, 9, true], "label": "x"}': "not four numbers",
    "[4, 3, 2]": None,
    "The cat": None,
    "None": None,
    "[" * 10_000: None,
    f"[0, 0, 1{'0' * 400}, 40]": "not finite",
}


@pytest.mark.parametrize("solution", BOXES, ids=lambda text: text[:40])
def test_boxes_lie_in_their_image(solution: str) -> None:
    row, reason = Row("q", solution, ("a.jpg",), {}), BOXES[solution]
    if reason is None:
        boxes.check(row, [(WIDTH, HEIGHT)])
        return
    with pytest.raises(BadRow, match=reason):
        boxes.check(row, [(WIDTH, HEIGHT)])
    if "four" not in reason:
        boxes.check(row, [])  # nothing to compare with
        boxes.check(row, [(9, 9), (9, 9)])
    boxes.check(Row("q", solution, ("a.jpg",), {METHOD: "math"}), [(WIDTH, HEIGHT)])


def test_boxes_are_of_the_upright_picture(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    lying = compressed(picture(WIDTH, HEIGHT), exif=exif)
    (folder / "images/turned.jpg").write_bytes(lying)
    rows = [vlm_row("q", "[0, 0, 40, 60]", "turned.jpg"), vlm_row("q", "[0, 0, 60, 40]", "turned.jpg")]
    found = built(folder / "out", Source("jsonl", write_rows(folder / "r.jsonl", rows), folder / "images"))
    assert [item.solution for item in found] == ["[0, 0, 40, 60]"]
    assert rejected(folder / "out") == [(2, "box [0, 0, 60, 40] reaches outside the image of 40 x 60 pixels")]


def mixed(folder: Path) -> list[Source]:
    """Sources of many pieces and shards, with some bad rows."""
    rows = [vlm_row(f"q{i} " + "x" * (37 * i % 700), f"[0, 0, {9 + i % 60}, 9]", f"{i % 8}.jpg") for i in range(300)]
    images = folder / "images"
    first = Source("jsonl", write_rows(folder / "a.jsonl", rows), images)
    second = Source("coco", write_json(folder / "i.json", COCO), images)
    return [first, second, Source("jsonl", write_rows(folder / "b.jsonl", rows[:50]), images, "iou")]


def test_the_bytes_depend_on_neither_processes_nor_pieces(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    what = mixed(folder)
    build_from(what, folder / "one", 60_000, 0.2)
    expected = content(folder / "one")
    assert len([name for name in expected if name.endswith(".tar")]) >= 10
    bad = [(Path(row["file"]).name, row["line"]) for row in map(json.loads, expected["rejected.jsonl"].splitlines())]
    wide = [i + 1 for i in range(300) if 9 + i % 60 > WIDTH + 1]
    assert bad == [
        *(("a.jsonl", line) for line in wide),
        *(("i.json", line) for line in (4, 5, 6, 7)),
    ]
    monkeypatch.setattr(sources, "PIECE_BYTES", 1000)
    assert len(sources.pieces(what[0], folder / "unused")) > 50
    build_from(what, folder / "pieces", 60_000, 0.2)
    assert content(folder / "pieces") == expected
    for workers in (2, 4):
        build_from(what, folder / f"{workers}", 60_000, 0.2, workers)
        assert content(folder / f"{workers}") == expected


def test_an_interrupted_build_goes_on_with_what_is_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    what = mixed(folder)
    build_from(what, folder / "whole", 60_000, 0.2)
    real, begun = writer.write, []

    def stop_at(count: int) -> None:
        def write(job: Any) -> int:
            begun.append(job[2].number)
            if len(begun) > count:
                raise KeyboardInterrupt
            return real(job)

        begun.clear()
        monkeypatch.setattr(writer, "write", write)

    out, partial = folder / "out", folder / "out.partial"
    stop_at(3)
    with pytest.raises(KeyboardInterrupt):
        build_from(what, out, 60_000, 0.2)
    first = {path: path.stat().st_ino for path in sorted(partial.glob("shard-*"))}
    assert len(first) == 6 and not out.exists()
    stop_at(5)
    with pytest.raises(KeyboardInterrupt):  # the three that are there count as they did
        build_from(what, out, 60_000, 0.2)
    assert {path: path.stat().st_ino for path in first} == first and len([*partial.glob("shard-*")]) == 10
    (partial / "shard-000001.index").write_bytes(b"damaged")
    monkeypatch.setattr(writer, "write", real)
    build_from(what, out, 60_000, 0.2)
    assert content(out) == content(folder / "whole")
    assert not [path for path in folder.iterdir() if "partial" in path.name]


def test_an_interrupted_build_of_something_else_begins_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    what = mixed(folder)
    real = writer.write

    def write(job: Any) -> int:
        if job[2].number >= 2:
            raise KeyboardInterrupt
        return real(job)

    monkeypatch.setattr(writer, "write", write)
    with pytest.raises(KeyboardInterrupt):
        build_from(what, folder / "out", 60_000, 0.2)
    monkeypatch.setattr(writer, "write", real)
    build_from(what[2:], folder / "out", 30_000)
    build_from(what[2:], folder / "fresh", 30_000)
    assert content(folder / "out") == content(folder / "fresh")


def test_an_input_that_changes_meanwhile_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    what = mixed(folder)
    real = writer.write

    def write(job: Any) -> int:
        (folder / "images/3.jpg").write_bytes(compressed(picture(2 * WIDTH, 2 * HEIGHT)))
        return real(job)

    monkeypatch.setattr(writer, "write", write)
    with pytest.raises(ValueError, match=r"a.jsonl:4: changed while shards were built"):
        build_from(what, folder / "out", 60_000, 0.2)
    assert not [path for path in folder.iterdir() if path.name.startswith("out")]


def test_two_at_once_are_refused(folder: Path) -> None:
    from megatron_vlmr1.checkpoint import partial

    jsonl = write_rows(folder / "r.jsonl", [vlm_row("q", "a")])
    with partial.making(folder / "out", "another"), pytest.raises(ValueError, match="another process is making it"):
        build([jsonl], [folder], folder / "out", 10**6)
