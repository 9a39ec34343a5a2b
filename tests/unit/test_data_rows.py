"""Rows: what is taken from them, and what is refused and why."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_vlmr1.data.rows import MAX_LINE_BYTES, BadRow, lines, load_image, parse
from tests.tiny import compressed, picture, plain_png


def turns(question: Any, answer: Any) -> bytes:
    return json.dumps(
        {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
    ).encode()


def test_question_and_truth_are_stripped() -> None:
    parsed = parse(turns("<image>\n<image> Which? ", " <think> a </think> <answer> [1, 2] </answer>\n"))
    assert (parsed.question, parsed.solution, parsed.images) == ("Which?", "[1, 2]", ())
    assert parse(turns("q", "an <answer> left open")).solution == "an <answer> left open"
    assert parse(turns("q", 7)).solution == "7"
    assert parse(turns("q", [1, 2.5, 3, 4])).solution == "[1, 2.5, 3, 4]"


BAD_ROWS = {
    b'{"id": 1, "conversations": [': "not JSON",
    b"[1, 2]": "must be a JSON object",
    b'{"conversations": 3}': "list of two turns",
    b'{"x": NaN}': "not JSON",
    b"[" * 100_000: "not JSON",
    b"\xff\xfe": "not JSON",
    b" " * (MAX_LINE_BYTES + 1): "longer than",
    b'{"x": "\\ud800"}': "not valid Unicode",
    turns("q", ""): "truth is empty",
    turns("q", "<answer> </answer>"): "truth is empty",
    turns("<image>", "a"): "question is empty",
    turns(["q"], "a"): "value of the human turn",
    turns([1, 2], "a"): "value of the human turn",
    turns("q", None): "value of the gpt turn",
    turns("q", {"a": 1}): "value of the gpt turn",
    turns("q", True): "value of the gpt turn",
    turns("q", "a")[:-1] + b', "image": 3}': "image must be",
    turns("q", "a")[:-1] + b', "image": [""]}': "image must be",
    turns("q", "a").replace(b"human", b"system"): "a human turn is missing",
}


@pytest.mark.parametrize("line", BAD_ROWS, ids=BAD_ROWS.values())
def test_bad_rows_say_why(line: bytes) -> None:
    with pytest.raises(BadRow, match=BAD_ROWS[line]):
        parse(line)


def test_hostile_image_paths_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    good = compressed(picture(20, 20), "PNG")
    for path in (root / "sub/a.png", tmp_path / "secret.png"):
        path.write_bytes(good)
    (root / "inside").symlink_to(root / "sub")
    (root / "outside").symlink_to(tmp_path)
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    (root / "text.png").write_text("no image")
    (root / "large.png").write_bytes(plain_png(13_000, 13_000))
    os.mkfifo(root / "pipe.png")
    assert load_image(root, "sub/a.png") == load_image(root, "inside/a.png") == (good, "png")
    refused = {
        str(root / "sub/a.png"): "must be relative",
        "../secret.png": "must be relative",
        "sub/../../secret.png": "must be relative",
        "a\0.png": "must be relative",
        "outside/secret.png": "link out of",
        "link.png": "link out of",
        "loop.png": "cannot be read",
        "absent.png": "is missing",
        "sub": "cannot be read",
        "pipe.png": "not a regular file",
        "text.png": "not a JPEG, PNG or WebP",
        "large.png": "64000000 pixels allowed",
        "x" * 5000: "cannot be read",
    }
    for name, reason in refused.items():
        with pytest.raises(BadRow, match=reason):
            load_image(root, name)


def test_lines_are_found_and_bounded(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbfa\n\n" + b"x" * (3 * MAX_LINE_BYTES) + b"\nlast")
    with path.open("rb") as file:
        found = [(offset, len(line), line[:4]) for offset, line in lines(file)]
        assert [line for _, line in lines(file, 5, 6)] == [b"\n"]
    last = 6 + 3 * MAX_LINE_BYTES + 1
    assert found == [(0, 2, b"a\n"), (5, 1, b"\n"), (6, MAX_LINE_BYTES + 1, b"xxxx"), (last, 4, b"last")]
