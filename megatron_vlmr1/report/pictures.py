"""Held-out pictures with the true box, the box before and the box after."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_vlmr1.report.run import LABELS, Answer
from megatron_vlmr1.rewards import answers as convention
from megatron_vlmr1.rewards.boxes import Box

MAX_CARDS = 12
_MAX_IMAGE_BYTES = 4 << 20
_SIGNATURES = ((b"\x89PNG\r\n\x1a\n", "image/png"), (b"\xff\xd8\xff", "image/jpeg"))


@dataclass(frozen=True)
class Rect:
    """A box as SVG draws it."""

    x: float
    y: float
    width: float
    height: float
    kind: str  # truth, before or after


@dataclass(frozen=True)
class Card:
    """One picture with its answers."""

    question: str
    picture: str  # data URI
    size: tuple[int, int]
    rects: tuple[Rect, ...]
    answers: tuple[tuple[str, Answer], ...]  # ("before" or "after", answer)
    change: float | None  # IoU after - IoU before


@dataclass(frozen=True)
class Grid:
    """The cards, what their questions have in common, and how they were chosen."""

    cards: tuple[Card, ...]
    stem: str
    caption: str


def build_grid(run_dir: Path, evaluations: Mapping[str, Mapping[str, Sequence[Answer]]]) -> Grid | None:
    """Return up to 12 pictures that spread over the whole range of change, or None for a run without pictures.

    They are of the first split.
    """
    split = next(iter(evaluations), "")
    labelled = evaluations.get(split, {})
    sides = [(name, {row.key: row for row in labelled[name]}) for name in LABELS if name in labelled]
    cards = []
    for key, row in sides[0][1].items() if sides else ():
        answers = tuple((name, rows[key]) for name, rows in sides if key in rows)
        picture = _data_uri(run_dir, row.image)
        if picture and row.image_size and len(answers) == len(sides):
            cards.append(_card(row, row.image_size, picture, answers))
    if not cards:
        return None
    pictured = len(cards)
    cards.sort(key=lambda card: card.change or 0.0)
    if pictured > MAX_CARDS:
        cards = [cards[round(i * (pictured - 1) / (MAX_CARDS - 1))] for i in range(MAX_CARDS)]
    which = f"All {pictured}" if len(cards) == pictured else f"{len(cards)} of the {pictured}"
    kind = "held-out samples" if split == "heldout" else f"samples of {split}"
    caption = f"{which} {kind} whose picture was saved (the first ones of the split, whatever their result)"
    if len(sides) == 2:
        caption += ", sorted by change in IoU from worst to best"
        if pictured > MAX_CARDS:
            caption += " and taken at even distances, both ends included"
    stem = _common_stem([card.question for card in cards])
    return Grid(tuple(cards), stem, caption + ".")


def split_think(text: str) -> tuple[str | None, str]:
    """Return the inside of the first <think> element (None without one) and the rest of the text."""
    inside = convention.first_block(text, "think")
    if inside is None:
        return None, text
    before, _, after = text.partition(f"<think>{inside}</think>")
    return inside.strip(), (before + after).strip()


def _card(row: Answer, size: tuple[int, int], picture: str, answers: tuple[tuple[str, Answer], ...]) -> Card:
    boxes = [("truth", row.truth), *((name, answer.box) for name, answer in answers)]
    rects = tuple(_rect(box, size, kind) for kind, box in boxes if box is not None)
    ious = [answer.iou or 0.0 for _, answer in answers]
    return Card(row.question, picture, size, rects, answers, ious[1] - ious[0] if len(ious) == 2 else None)


def _rect(box: Box, size: tuple[int, int], kind: str) -> Rect:
    """The box with its corners in order, cut to a little more than the picture so that its lines stay visible."""
    spans = []
    for a, b, length in ((box[0], box[2], size[0]), (box[1], box[3], size[1])):
        low, high = (min(max(side, -0.02 * length), 1.02 * length) for side in sorted((a, b)))
        spans.append((low, high - low))
    (x, width), (y, height) = spans
    return Rect(x, y, width, height, kind)


def _data_uri(run_dir: Path, name: str | None) -> str | None:
    """The saved picture as a data URI; None where there is none inside the run, or it is no PNG or JPEG."""
    if name is None or "\0" in name:
        return None
    root = run_dir.resolve()
    for folder in (root / "evaluations", root):
        file = (folder / name).resolve()
        if file.is_relative_to(root) and file.is_file() and file.stat().st_size <= _MAX_IMAGE_BYTES:
            data = file.read_bytes()
            for signature, mime in _SIGNATURES:
                if data.startswith(signature):
                    return f"data:{mime};base64,{base64.b64encode(data).decode()}"
    return None


def _common_stem(questions: Sequence[str]) -> str:
    """What all questions begin with, cut after a colon or else a word; empty where that is short."""
    low, high = min(questions), max(questions)
    if low == high:
        return ""
    length = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    cut = low.rfind(": ", 0, length)
    stem = low[: cut + 2] if cut >= 0 else low[: low.rfind(" ", 0, length) + 1]
    return stem if len(stem) >= 24 else ""
