"""From rows to figures, tables and pictures."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_vlmr1.evaluate import pictures, results
from megatron_vlmr1.rewards import tasks
from megatron_vlmr1.telemetry.files import json_line

COUNTED = {"accuracy": 0.0, "mae": float("nan"), "score_mean": 0.0, "format_rate": 1.0, "samples": 4.0, "failed": 1.0}


def counting_row(index: int, error: float | None, category: str | None = None) -> dict[str, Any]:
    return {
        "index": index,
        "question": "How many?",
        "truth": "3",
        "answer": None if error is None else 3 + error,
        "category": category,
        "accuracy": float(error == 0),
        "abs_error": error,
        "score": 1.0 if error == 0 else 0.0,
        "format": 1.0,
        "reward": 0.5,
        "image_size": [40, 30],
    }


def test_summary_of_means() -> None:
    task = tasks.get("counting")
    rows = [counting_row(i, error, "ab"[i % 2]) for i, error in enumerate([0.0, 2.0, None, 1.0])]
    found = results.summarise(rows, task, COUNTED | {"accuracy": 0.25, "mae": 1.0, "reward_mean": 0.5}, 0)
    assert (found["accuracy"], found["mae"], found["failed"]) == (0.25, 1.0, 1.0)
    low, high = found["intervals"]["accuracy"]
    assert 0 <= low < 0.25 < high <= 0.75
    assert found["intervals"]["reward_mean"] == [0.5, 0.5]
    assert "samples" not in found["intervals"]
    assert found["categories"] == {
        "a": {"accuracy": 0.5, "mae": 0.0, "score_mean": 0.5, "format_rate": 1.0, "reward_mean": 0.5, "samples": 2.0},
        "b": {"accuracy": 0.0, "mae": 1.5, "score_mean": 0.0, "format_rate": 1.0, "reward_mean": 0.5, "samples": 2.0},
    }
    json.dumps(found, allow_nan=False)


def test_a_figure_that_no_row_has_is_null_not_zero() -> None:
    found = results.summarise([counting_row(0, None)], tasks.get("counting"), COUNTED, 0)
    assert found["mae"] is None and "mae" not in found["intervals"] and found["categories"] == {}
    assert results.cell(found, "mae") == "–"
    assert results.cell(found, "format_rate") == "1 [1, 1]"
    assert results.cell(found, "samples") == "4"


def ovd_row(index: int, hit: bool, category: str) -> dict[str, Any]:
    box = {"bbox_2d": [10.0, 10.0, 30.0, 25.0], "label": "cat"}
    away = {"bbox_2d": [-50.0, 0.0, 900.0, 5.0], "label": "\ud800 \0 \u05d0"}
    return {
        "index": index,
        "question": "Find the cat. " * 20,
        "truth": "x",
        "category": category,
        "answer": [],
        "predicted": [box if hit else away, {"bbox_2d": None, "label": ""}],
        "true": [box],
        "f1": 2 / 3 if hit else 0.0,
        "parsed": 1.0,
        "format": 1.0,
        "reward": None,
        "image_size": [40, 30],
    }


def test_summary_of_detections() -> None:
    rows = [ovd_row(i, i % 2 == 0, "color" if i < 6 else "logo") for i in range(12)]
    counted = {"f1_mean": 1 / 3, "parsed_rate": 1.0, "format_rate": 1.0, "samples": 12.0, "failed": 0.0}
    found = results.summarise(rows, tasks.get("ovd"), counted, 0)
    assert list(found)[:2] == ["map", "ap50"]
    # 6 of 12 found, precision 1 up to recall .5: 51 of COCO's 101 recalls.
    assert found["map"] == pytest.approx(51 / 101)
    assert (found["greedy_precision"], found["greedy_recall"]) == (0.25, 0.5)
    assert found["intervals"]["map"][0] < found["map"] < found["intervals"]["map"][1]
    assert found["categories"]["color"]["greedy_recall"] == 0.5
    assert found["categories"]["color"]["samples"] == 6.0


def test_markdown_escapes_and_lists_every_figure() -> None:
    rows = [counting_row(i, float(i), f"c\\|{i}<b>") for i in range(6)]
    split = results.summarise(rows, tasks.get("counting"), COUNTED | {"mae": 2.5}, 0)
    page = results.markdown("after", "counting", {"val": split}, ["val"])
    assert page.startswith("# after: counting\n")
    assert "| mae | 2.5 [" in page and "| c\\\\\\|5&lt;b> | 0 |" in page
    assert "![val](after_val_worst.png)" in page


def test_worst_rows() -> None:
    task = tasks.get("ovd")
    rows = [ovd_row(i, i not in (3, 7), "a") for i in range(20)]
    rows[9]["image_size"] = None
    assert [row["index"] for row in pictures.worst_rows(rows, task, 4)] == [3, 7, 0, 1]
    rows[5]["f1"] = None
    assert [row["index"] for row in pictures.worst_rows(rows, task, 3)] == [5, 3, 7]
    assert 9 not in [row["index"] for row in pictures.worst_rows(rows, task, 20)]


def png(index: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (40, 30), (index * 20, 200, 200)).save(out, "PNG")
    return out.getvalue()


def test_the_sheet_shows_twelve_cases_with_their_boxes() -> None:
    rows = [ovd_row(i, i % 2 == 0, "a") for i in range(30)]
    data = pictures.worst_sheet(rows, tasks.get("ovd"), png)
    assert data is not None
    sheet = Image.open(io.BytesIO(data))
    assert sheet.size == (4 * 328 + 8, 3 * 332 + 8)
    pixels = np.asarray(sheet.convert("RGB")).reshape(-1, 3)
    # The outline of the true box, 160 x 120 pixels of 2, in each cell, and its label and caption.
    green = (pixels == (0, 158, 115)).all(1).sum()
    assert green > 12 * 2 * 2 * (160 + 120 - 4)
    assert (pixels == (213, 94, 0)).all(1).sum() > 12 * 300


def test_a_box_beyond_all_numbers_is_drawn_to_the_edge() -> None:
    row = ovd_row(0, True, "a") | {"predicted": [{"bbox_2d": (5.0, 5.0, math.inf, math.inf), "label": ""}]}
    data = pictures.worst_sheet([json.loads(json_line(row))], tasks.get("ovd"), png)
    assert data is not None
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))[:250]
    assert (pixels == (213, 94, 0)).all(2).sum() > 2 * (250 + 180)


def test_a_sheet_of_one_text_answer_and_of_no_picture() -> None:
    row = counting_row(3, 1.0) | {"question": "\u202e\u05d0" * 4000, "truth": "\ud800" * 9, "image_size": [40, 30]}
    data = pictures.worst_sheet([row], tasks.get("counting"), png)
    assert data is not None and Image.open(io.BytesIO(data)).size == (336, 340)
    assert pictures.worst_sheet([row | {"image_size": None}], tasks.get("counting"), png) is None
