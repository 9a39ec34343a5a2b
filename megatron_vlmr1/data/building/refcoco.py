"""Referring expressions as json: one row an expression.

A list of entries, each with

- `image` (or `img_path`, `file_name`): the picture;
- `problem`: the whole question; or `normal_caption`, `expression`, `sentence` or `caption`: what the question asks for;
  or `sentences`: a list of such, as texts or as objects with `raw` or `sent`, each of which becomes a row;
- `solution` or `bbox`: [x1, y1, x2, y2] in pixels; [x, y, width, height] where the entry has ``"bbox_format": "xywh"``
  or the call says so.

Or RefCOCO's own tables as one object: `images` and `annotations` of COCO and `refs` with `ann_id` and `sentences`;
their boxes are [x, y, width, height]. Other keys of an entry are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_vlmr1.data.building.coco import corners
from megatron_vlmr1.data.scenes import QUESTION

_IMAGES = ("image", "img_path", "file_name")
_EXPRESSIONS = ("normal_caption", "expression", "sentence", "caption")
_BOXES = ("solution", "bbox")


def rows(
    document: Any, path: Path, question: str | None, box_format: str
) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yield (number of the entry from 1, VLM-R1 row, or why there is none); see the module.

    Raises:
        ValueError: neither a list nor such tables.
    """
    entries = _joined(document) if isinstance(document, dict) else document
    if not isinstance(entries, list):
        raise ValueError(f"{path}: not a list of referring expressions, nor images, annotations and refs")
    for number, entry in enumerate(entries, start=1):
        if isinstance(entry, str):
            yield number, f"not an object: {entry[:80]!r}" if isinstance(document, list) else entry
            continue
        try:
            found = list(_rows_of(entry, question or QUESTION, box_format))
        except ValueError as error:
            yield number, str(error)
            continue
        yield from ((number, row) for row in found)


def _rows_of(entry: Any, template: str, box_format: str) -> Iterator[dict[str, Any]]:
    if not isinstance(entry, dict):
        raise ValueError("an entry must be a JSON object")
    image = _first(entry, _IMAGES)
    if entry[image] is None:
        raise ValueError(f"{image} is empty")
    box = entry.get(_first(entry, _BOXES))
    box_format = entry.get("bbox_format", box_format)
    if box_format not in ("xyxy", "xywh"):
        raise ValueError(f"bbox_format {box_format!r:.80} must be xyxy or xywh")
    as_corners = corners(box)  # refuses what is not four numbers
    solution = as_corners if box_format == "xywh" else box
    used = {image, "problem", "sentences", "bbox_format", *_EXPRESSIONS, *_BOXES}
    kept = {key: value for key, value in entry.items() if key not in used}
    for question in _questions(entry, template):
        yield {**kept, "image": entry[image], "question": question, "solution": solution}


def _questions(entry: dict[str, Any], template: str) -> list[str]:
    if "problem" in entry:
        return [_text(entry["problem"], "problem")]
    if "sentences" in entry:
        sentences = entry["sentences"]
        if not isinstance(sentences, list) or not sentences:
            raise ValueError("sentences must be a list with something in it")
        texts = [s.get("raw", s.get("sent")) if isinstance(s, dict) else s for s in sentences]
        return [template.replace("{expression}", _text(text, "sentences")) for text in texts]
    key = _first(entry, _EXPRESSIONS)
    return [template.replace("{expression}", _text(entry[key], key))]


def _joined(document: dict[str, Any]) -> Any:
    """Entries from the tables of RefCOCO, or None where they are not such; a text is why one has no row."""
    tables = [document.get(name) for name in ("images", "annotations", "refs")]
    if not all(isinstance(table, list) and all(isinstance(item, dict) for item in table) for table in tables):
        return None
    images, annotations = ({str(item.get("id")): item for item in table or ()} for table in tables[:2])
    return [_entry(ref, images, annotations) for ref in tables[2] or ()]


def _entry(
    ref: dict[str, Any], images: dict[str, dict[str, Any]], annotations: dict[str, dict[str, Any]]
) -> dict[str, Any] | str:
    annotation = annotations.get(str(ref.get("ann_id")))
    if annotation is None:
        return f"its ann_id {ref.get('ann_id')!r:.80} is none of the file's annotations"
    image = images.get(str(annotation.get("image_id")))
    if image is None:
        return f"the image_id {annotation.get('image_id')!r:.80} is none of the file's images"
    kept = {key: value for key, value in ref.items() if key not in _IMAGES}
    return {
        **kept,
        "image": image.get("file_name"),
        "sentences": ref.get("sentences"),
        "bbox": annotation.get("bbox"),
        "bbox_format": "xywh",
    }


def _first(entry: dict[str, Any], names: tuple[str, ...]) -> str:
    for name in names:
        if name in entry:
            return name
    raise ValueError(f"the entry has none of the keys {', '.join(names)}")


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{what} must be text")
    return value.strip()
