"""`vlmr1 shards`: what it prints, where, and with which exit code."""

from __future__ import annotations

import json
import shutil
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
    "options", [["--shard-size", "0MB"], ["--shard-size", "10XB"], ["--max-rejected", "2"], ["--n"]]
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


@pytest.mark.parametrize("command", [[], ["build"], ["verify"], ["inspect"]])
def test_help_has_an_example(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["shards", *command, "--help"])
    assert left.value.code == 0
    assert "example" in capsys.readouterr().out
