"""A contact sheet of a split's worst answers: predicted and true boxes on the picture, question and answer below."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from megatron_vlmr1.data import images
from megatron_vlmr1.rewards.task import Task

CASES = 12
_COLUMNS = 4
_CELL, _CAPTION, _GAP = (320, 260), 64, 8  # pixels
_LINE, _LETTERS = 15, 48  # height of a line, and letters that fit one
_TRUE, _PREDICTED = (0, 158, 115), (213, 94, 0)  # Okabe and Ito's bluish green and vermilion

Row = Mapping[str, Any]


def worst_rows(rows: Sequence[Row], task: Task, count: int = CASES) -> list[Row]:
    """Return the rows with a picture whose answers are worst by the task's own metric; no value is the worst value."""
    metric = task.worst_by or next(iter(task.aggregates.values()))
    pictured = [row for row in rows if row["image_size"] is not None]
    worst = sorted(pictured, key=lambda row: (row[metric] is not None, float(row[metric] or 0.0), row["index"]))
    return worst[:count]


def worst_sheet(rows: Sequence[Row], task: Task, read: Callable[[int], bytes]) -> bytes | None:
    """Return a PNG of `worst_rows`, or None where no row has a picture.

    Args:
        rows: of the split.
        task: says which are the worst.
        read: index of a row -> its first image, compressed.
    """
    worst = worst_rows(rows, task)
    if not worst:
        return None
    columns = min(_COLUMNS, len(worst))
    lines = -(-len(worst) // columns)
    width, height = _CELL[0] + _GAP, _CELL[1] + _CAPTION + _GAP
    sheet = Image.new("RGB", (columns * width + _GAP, lines * height + _GAP), "white")
    for place, row in enumerate(worst):
        corner = (_GAP + place % columns * width, _GAP + place // columns * height)
        sheet.paste(_cell(row, images.decode(read(row["index"]))), corner)
    out = io.BytesIO()
    sheet.save(out, "PNG", optimize=True)
    return out.getvalue()


def _cell(row: Row, picture: Image.Image) -> Image.Image:
    cell = Image.new("RGB", (_CELL[0], _CELL[1] + _CAPTION), "white")
    scale = min(_CELL[0] / picture.width, _CELL[1] / picture.height)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    small = picture.resize(size)
    draw = ImageDraw.Draw(small)
    for side, colour in (("true", _TRUE), ("predicted", _PREDICTED)):
        for item in row.get(side, ()):
            _draw(draw, item, scale, size, colour)
    cell.paste(small, ((_CELL[0] - size[0]) // 2, 0))
    draw = ImageDraw.Draw(cell)
    for number, (colour, text) in enumerate(_caption(row)):
        draw.text((2, _CELL[1] + 4 + number * _LINE), text, fill=colour, font=ImageFont.load_default(12))
    return cell


def _draw(draw: ImageDraw.ImageDraw, item: Mapping[str, Any], scale: float, size: Sequence[int], colour: Any) -> None:
    if item["bbox_2d"] is None:
        return
    x1, y1, x2, y2 = map(float, item["bbox_2d"])  # "Infinity" too, as `json_line` writes what JSON lacks
    left, right = (min(max(x * scale, 0.0), size[0] - 1.0) for x in (min(x1, x2), max(x1, x2)))
    top, bottom = (min(max(y * scale, 0.0), size[1] - 1.0) for y in (min(y1, y2), max(y1, y2)))
    draw.rectangle((left, top, right, bottom), outline=colour, width=2)
    draw.text((left + 3, top + 2), _short(item["label"], 24), fill=colour, font=ImageFont.load_default(11))


def _caption(row: Row) -> list[tuple[Any, str]]:
    boxes = "true" in row
    truth = f"{len(row['true'])} boxes" if boxes else row["truth"]
    said = f"{len(row['predicted'])} boxes" if boxes else row["answer"]
    # The end of a question says what is asked for.
    lines = textwrap.wrap(_plain(row["question"])[-4 * _LETTERS :], _LETTERS)[-2:]
    question = [("black", line) for line in lines]
    return [*question, (_TRUE, _short(f"true: {truth}")), (_PREDICTED, _short(f"predicted: {said}"))]


def _short(text: str, letters: int = _LETTERS) -> str:
    text = _plain(text)
    return text if len(text) <= letters else text[: letters - 3] + "..."


def _plain(text: str) -> str:
    """Printable ASCII: the built-in font has little more, and the text is a model's."""
    return " ".join(text.encode("ascii", "replace").decode().replace("\0", "?").split())
