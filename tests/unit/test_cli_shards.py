"""`vlmr1 shards`: what it prints, where, and with which exit code."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import pytest

from megatron_vlmr1.cli.main import main
from tests.tiny import compressed, picture


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    lines = []
    for i in range(12):
        (tmp_path / f"images/{i}.jpg").write_bytes(compressed(picture(100 + 40 * i, 80, seed=i)))
        turns = [{"from": "human", "value": f"<image>q{i}"}, {"from": "gpt", "value": "a"}]
        lines.append(json.dumps({"id": i, "image": f"{i}.jpg", "conversations": turns}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return tmp_path


def build(rows: Path, *options: str) -> int:
    words = ["--jsonl", str(rows / "rows.jsonl"), "--images", str(rows / "images"), *options]
    return main(["shards", "build", str(rows / "out"), *words])


def test_build_verify_inspect(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build(rows, "--shard-size", "20KB", "--json") == 0
    built = capsys.readouterr()
    summary = json.loads(built.out)
    assert summary["samples"] == 12 and summary["shards"] > 2 and built.err == ""

    assert main(["shards", "verify", str(rows / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"indexed": 12, "delivered": 12, "damaged": []}
    assert main(["shards", "inspect", str(rows / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["samples"], found["bytes"], found["shards"]) == (12, summary["bytes"], summary["shards"])
    assert main(["shards", "inspect", str(rows / "out")]) == 0
    assert "12 samples with 12 images" in capsys.readouterr().out

    tar = rows / "out/shard-000001.tar"
    tar.write_bytes(b"")
    assert main(["shards", "verify", str(rows / "out"), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["damaged"] and report["delivered"] == 12 - len(report["damaged"])
    assert set(report["damaged"][0]) == {"shard", "key", "reason"}
    assert main(["shards", "verify", str(rows / "out")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(report["damaged"]) + 1 and lines[0].startswith("shard-000001.tar 0000")


def test_defaults_and_pairs(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (rows / "images/rows.jsonl").write_bytes((rows / "rows.jsonl").read_bytes())
    assert main(["shards", "build", str(rows / "a"), "--jsonl", str(rows / "images/rows.jsonl")]) == 0
    twice = ["--jsonl", str(rows / "rows.jsonl")] * 2
    assert main(["shards", "build", str(rows / "b"), *twice, "--images", str(rows / "images")]) == 0
    assert main(["shards", "build", str(rows / "c"), *twice, *["--images", str(rows / "images")] * 2]) == 0
    assert [line.split(": ")[1].split()[0] for line in capsys.readouterr().out.splitlines()] == ["12", "24", "24"]


def test_bad_input_is_one_line_and_code_2(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (rows / "rows.jsonl").read_text()

    def failed(code: int, *message: str) -> None:
        line = capsys.readouterr().err
        assert code == 2 and line.count("\n") == 1 and all(part in line for part in message), line

    (rows / "rows.jsonl").write_text("\n".join([text] * 10) + "\n{broken")
    failed(
        build(rows, "--max-rejected", "0"), "rows.jsonl:121: not JSON", "1 bad rows in 121; --max-rejected 0.01 would"
    )
    assert build(rows, "--json") == 0  # one in a hundred may be bad
    assert json.loads(capsys.readouterr().out)["rejected"] == 1
    shutil.rmtree(rows / "out")
    (rows / "rows.jsonl").write_text(text + "\n{broken")
    failed(build(rows), "rows.jsonl:13: not JSON", "first of 1 bad rows in 13; --max-rejected 0.08 would leave them")
    (rows / "rows.jsonl").write_text(text.replace("3.jpg", "absent.jpg"))
    failed(build(rows), "rows.jsonl:4: image 'absent.jpg' is missing")
    assert not (rows / "out").exists()
    assert build(rows, "--max-rejected", "0.1") == 0
    assert "1 rows left out, see rejected.jsonl" in capsys.readouterr().out
    failed(build(rows), "exists already")
    failed(main(["shards", "verify", str(rows / "images")]), "holds no shards")
    (rows / "rows.jsonl").write_text("")
    failed(main(["shards", "build", str(rows / "x"), "--jsonl", str(rows / "rows.jsonl")]), "no rows")


def test_a_reward_method_of_a_row_is_not_ignored_in_silence(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (rows / "rows.jsonl").read_text().replace('"id": 3', '"id": 3, "accu_reward_method": "mcq"')
    (rows / "rows.jsonl").write_text(text)
    assert build(rows) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "WARNING" in line]
    assert "1 rows name their accu_reward_method, which counts" in line


@pytest.mark.parametrize(
    "options",
    [["--shard-size", "0MB"], ["--shard-size", "10XB"], ["--max-rejected", "2"], ["--n"], ["--workers", "0"]],
)
def test_bad_options(options: list[str], rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        build(rows, *options)
    assert left.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("text", ["64MB", "64 mb", "64000000", "64M", "64000KB"])
def test_sizes(text: str) -> None:
    from megatron_vlmr1.cli.common import byte_size

    assert byte_size(text) == 64_000_000
    assert byte_size("1GiB") == 2**30


@pytest.mark.parametrize("command", [[], ["build"], ["index"], ["verify"], ["inspect"]])
def test_help_has_an_example(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["shards", *command, "--help"])
    assert left.value.code == 0
    assert "example" in capsys.readouterr().out


def test_all_sources_in_the_order_given(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_vlmr1.data.index import ShardSet

    category, image = {"id": 1, "name": "cat"}, {"id": 5, "file_name": "0.jpg"}
    coco = {"images": [image], "annotations": [], "categories": [category]}
    (rows / "coco.json").write_text(json.dumps(coco))
    (rows / "refs.json").write_text(json.dumps([{"image": "1.jpg", "sentence": "it", "bbox": [1, 2, 30, 40]}]))
    (rows / "one.jsonl").write_text((rows / "rows.jsonl").read_text().splitlines()[0])
    words = ["--coco", rows / "coco.json", "--jsonl", rows / "one.jsonl", "--refcoco", rows / "refs.json"]
    methods = ["--method", "od_ap", "--method", "none", "--method", "iou"]
    options = ["--images", rows / "images", *methods, "--question", "{classes}{expression}", "--box-format", "xywh"]
    assert main(["shards", "build", *map(str, [rows / "out", *words, *options]), "--workers", "1"]) == 0
    shards = ShardSet.open(rows / "out")
    found = [shards.read(i) for i in range(3)]
    assert [(s.question, s.solution, s.extra.get("accu_reward_method")) for s in found] == [  # type: ignore[union-attr]
        ("cat{expression}", "None", "od_ap"),
        ("q0", "a", None),
        ("{classes}it", "[1, 2, 31, 42]", "iou"),
    ]


def test_options_that_do_not_fit_are_one_line(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jsonl, coco = ["--jsonl", str(rows / "rows.jsonl")], rows / "coco.json"
    documents = {
        "[": "coco.json: not JSON",
        "[]": "coco.json: not a COCO file",
        '{"images": [], "annotations": [], "categories": [7]}': "coco.json: not a COCO file",
        '{"images": [], "annotations": [], "categories": []}': "coco.json: not a COCO file: it needs categories",
    }
    cases: list[tuple[list[str], str]] = [
        ([], "no source of rows: give --jsonl, --coco, --refcoco or --parquet"),
        ([*jsonl, "--question", "x"], "--question is about --coco and --refcoco"),
        ([*jsonl, "--classes", "present"], "--classes is about --coco"),
        ([*jsonl, "--box-format", "xywh"], "--box-format is about --refcoco"),
        ([*jsonl, "--images", "a", "--images", "b"], "2 times --images but 1 sources"),
        ([*jsonl, "--method", "a", "--method", "b"], "2 times --method but 1 sources"),
        (["--coco", str(rows / "rows.jsonl"), "--question", "x"], "must hold {classes} for --coco"),
        (["--coco", str(rows / "absent.json")], "absent.json: no such json file"),
        (["--parquet", str(rows / "absent")], "absent: no such directory of parquet files"),
        (["--parquet", str(rows / "images")], "images: no rows"),
    ]
    for words, message in cases:
        assert main(["shards", "build", str(rows / "out"), *words]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and message in error, error
    for text, message in documents.items():
        coco.write_text(text)
        assert main(["shards", "build", str(rows / "out"), "--coco", str(coco)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and message in error, error
    assert not [path for path in rows.iterdir() if path.name.startswith("out")]


def test_index_and_repair(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build(rows, "--shard-size", "20KB", "--json") == 0
    shards = json.loads(capsys.readouterr().out)["shards"]
    out = str(rows / "out")
    for path in (rows / "out").glob("*.index"):
        path.unlink()
    assert main(["shards", "verify", out]) == 2
    assert "shard-000000.index: missing; `vlmr1 shards index` makes it anew" in capsys.readouterr().err
    assert main(["shards", "verify", out, "--repair-index", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["indexed"], report["delivered"], len(report["repaired"])) == (12, 12, shards)
    assert main(["shards", "index", out]) == 0
    assert capsys.readouterr().out == "0 shards indexed, 0 samples in them\n"

    tar, index = rows / "out/shard-000001.tar", rows / "out/shard-000001.index"
    with tarfile.open(tar) as archive:
        second = archive.getmembers()[1].offset
    data = bytearray(tar.read_bytes())
    data[100] ^= 255  # the first header, and nothing else
    tar.write_bytes(data)
    assert main(["shards", "verify", out]) == 0
    index.unlink()
    capsys.readouterr()
    assert main(["shards", "index", out]) == 1
    line = capsys.readouterr().out.splitlines()[0]
    assert "shard-000001.tar: its index was missing; indexed" in line and f"bytes 0 to {second} can't be read" in line
    assert main(["shards", "verify", out, "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["damaged"]) == 1
    assert main(["shards", "index", str(rows / "images")]) == 2
    assert "holds no .tar files" in capsys.readouterr().err


def test_inspect_draws_a_sheet_and_bars(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    entries = [{"image": f"{i}.jpg", "sentence": "it", "bbox": [10, 20, 60, 70]} for i in range(12)]
    (rows / "refs.json").write_text(json.dumps(entries))
    words = ["--refcoco", str(rows / "refs.json"), "--images", str(rows / "images"), "--shard-size", "20KB"]
    assert main(["shards", "build", str(rows / "out"), *words]) == 0
    (rows / "out/shard-000000.tar").unlink()
    capsys.readouterr()
    sheet = rows / "sheet.png"
    assert main(["shards", "inspect", str(rows / "out"), "--sheet", str(sheet), "--count", "4"]) == 0
    text = capsys.readouterr().out
    assert "images per sample:\n" in text and "characters of a question:\n" in text
    bars = [line for line in text.splitlines() if line.startswith("      <= 448")]
    assert len(bars) == 1 and bars[0].count("#") == 40  # the widest bin of the longer sides
    with Image.open(sheet) as drawn:
        assert drawn.size == (512, 628)
        pixels = drawn.convert("RGB")
    # The third tile is sample 6: 340 x 80 pixels, shown 252 x 59 from (2, 98); its box begins at (9.4, 112.8).
    assert pixels.getpixel((10, 314 + 130)) == pixels.getpixel((30, 314 + 113)) == (0xE6, 0x19, 0x4B)
    assert pixels.getpixel((8, 9)) != (0, 0, 0)  # the first is damaged and says so
    assert main(["shards", "inspect", str(rows / "out"), "--sheet", str(sheet), "--count", "0"]) == 2
    assert "choose 1 to 400" in capsys.readouterr().err
