"""A contact sheet: samples of a directory of shards, with the boxes of their solutions."""

from __future__ import annotations

import io
import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from megatron_vlmr1.data import boxes, images
from megatron_vlmr1.data.index import ShardSet
from megatron_vlmr1.types import Damage, Sample

TILE = 256  # pixels, the side of a picture's square
MAX_SAMPLES = 400
_TEXT = 58  # pixels below it
_LINE = 42  # characters that fit
_COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080")


def contact_sheet(directory: str | Path, count: int) -> bytes:
    """Return a PNG of `count` samples, spread evenly over the shards, in order; their first pictures are shown.

    Below each: its key, the end of its question and, where it is not boxes, its solution. A sample or
    picture that cannot be read is a tile that says so.

    Raises:
        ValueError: as `ShardSet.open`, no samples, or `count` is not between 1 and MAX_SAMPLES.
    """
    if not 1 <= count <= MAX_SAMPLES:
        raise ValueError(f"a contact sheet of {count} samples: choose 1 to {MAX_SAMPLES}")
    shards = ShardSet.open(directory)
    if not len(shards):
        raise ValueError(f"{directory}: the shards hold no samples")
    count = min(count, len(shards))
    columns = math.ceil(math.sqrt(count))
    sheet = Image.new("RGB", (columns * TILE, -(-count // columns) * (TILE + _TEXT)), "white")
    for place in range(count):
        tile = _tile(shards.read(place * len(shards) // count))
        sheet.paste(tile, (place % columns * TILE, place // columns * (TILE + _TEXT)))
    out = io.BytesIO()
    sheet.save(out, "PNG")
    return out.getvalue()


def _tile(item: Sample | Damage) -> Image.Image:
    tile = Image.new("RGB", (TILE, TILE + _TEXT), "white")
    draw = ImageDraw.Draw(tile)
    lines = [item.key]
    try:
        if isinstance(item, Damage):
            raise ValueError(item.reason)
        found = boxes.of_solution(item.solution)
        lines += [*_end(item.question), "" if found else item.solution]
        if item.images:
            _paste(tile, draw, images.decode(item.images[0]), found or [])
        if len(item.images) > 1:
            lines[0] += f" (1 of {len(item.images)} pictures)"
    except ValueError as error:
        draw.text((4, 4), _short(str(error)), "red", ImageFont.load_default())
    draw.multiline_text((4, TILE + 2), "\n".join(map(_short, lines)), "black", ImageFont.load_default(), spacing=2)
    return tile


def _paste(tile: Image.Image, draw: ImageDraw.ImageDraw, picture: Image.Image, found: list[boxes.LabelledBox]) -> None:
    scale = min((TILE - 4) / picture.width, (TILE - 4) / picture.height)
    small = picture.resize([max(1, round(side * scale)) for side in picture.size])  # type: ignore[arg-type]
    left, top = (TILE - small.width) // 2, (TILE - small.height) // 2
    tile.paste(small, (left, top))
    labels = list(dict.fromkeys(label for label, _ in found))
    for label, corners in found:
        x1, y1, x2, y2 = (min(max(value * scale, -9.0), TILE + 9.0) for value in corners)
        if not (x1 <= x2 and y1 <= y2):  # reversed, or not numbers
            continue
        colour = _COLOURS[labels.index(label) % len(_COLOURS)]
        draw.rectangle((left + x1, top + y1, left + x2, top + y2), outline=colour, width=2)
        if label:
            draw.text((left + x1 + 3, top + y1 + 1), _short(label), colour, ImageFont.load_default())


def _end(text: str) -> list[str]:
    """The last two lines of a text: data sets ask with the same first words."""
    line = _plain(text)
    if len(line) > 2 * _LINE:
        line = "-" + line[1 - 2 * _LINE :]
    return [line[:_LINE], line[_LINE:]]


def _short(text: str) -> str:
    line = _plain(text)
    return line if len(line) <= _LINE else line[: _LINE - 1] + "-"


def _plain(text: str) -> str:
    return " ".join(text.encode("latin-1", "replace").decode("latin-1").split())
