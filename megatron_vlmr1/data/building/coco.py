"""COCO detection files (instances.json): one row an image."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

QUESTION = "Where is each object of these classes: {classes}?"


def rows(
    document: Any, path: Path, question: str | None, only_present: bool
) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yield (number of the image in the file from 1, VLM-R1 row, or why there is none).

    The solution is a json list of ``{"bbox_2d": [x1, y1, x2, y2], "label"}`` in pixels, or "None" for an image
    without annotations; crowds are left out. The question names the classes of the file, or, with `only_present`,
    those of the image (of the file where it has none). An annotation of an image that the file lacks is a bad row of
    its own, numbered behind the images.

    Raises:
        ValueError: not such a file.
    """
    images, names = _parts(document, path)
    template = question or QUESTION
    ids = {image.get("id"): number for number, image in enumerate(images) if _is_id(image.get("id"))}
    boxes: list[list[dict[str, Any]]] = [[] for _ in images]
    bad: dict[int, str] = {}
    strays = []
    for order, annotation in enumerate(document["annotations"]):
        what = f"annotation {order + 1}"
        image_id = annotation.get("image_id") if isinstance(annotation, dict) else None
        number = ids.get(image_id) if _is_id(image_id) else None
        if number is None:
            strays.append(f"{what}: its image_id {image_id!r:.80} is none of the file's images")
        elif not annotation.get("iscrowd"):
            try:
                boxes[number].append(_box(annotation, names))
            except ValueError as error:
                bad.setdefault(number, f"{what}: {error}")
    for number, image in enumerate(images):
        if not _is_id(image.get("id")) or ids[image["id"]] != number:
            bad[number] = f"the id {image.get('id')!r:.80} is no whole number or text, or a later image has it too"
        found = boxes[number]
        labels = {box["label"] for box in found} if only_present and found else set(names.values())
        classes = ", ".join(dict.fromkeys(name for name in names.values() if name in labels))
        row = {
            "id": image.get("id"),
            "image": image.get("file_name"),
            "question": template.replace("{classes}", classes),
            "solution": f"```json\n{json.dumps(found)}\n```" if found else "None",
        }
        yield number + 1, bad.get(number) or (row if row["image"] else "the image has no file_name")
    yield from enumerate(strays, start=len(images) + 1)


def corners(box: Any) -> list[int | float]:
    """Return [x1, y1, x2, y2] of [x, y, width, height], to a hundredth of a pixel.

    Raises:
        ValueError: not four numbers, or too large ones.
    """
    if not isinstance(box, list) or len(box) != 4 or not all(type(number) in (int, float) for number in box):
        raise ValueError(f"the bbox {json.dumps(box)[:80]} is not four numbers")
    x, y, width, height = box
    try:
        return [_tidy(number) for number in (x, y, x + width, y + height)]
    except OverflowError as error:  # an integer of hundreds of digits
        raise ValueError("the bbox has numbers that are too large") from error


def _parts(document: Any, path: Path) -> tuple[list[dict[str, Any]], dict[Any, str]]:
    """The images, and the classes' names by id."""
    parts = [document.get(key) if isinstance(document, dict) else None for key in ("images", "annotations")]
    categories = document.get("categories") if isinstance(document, dict) else None
    if not all(isinstance(part, list) for part in (*parts, categories)):
        raise ValueError(f"{path}: not a COCO file: images, annotations and categories must be lists")
    images, _ = parts
    if not all(isinstance(item, dict) for item in (*(images or ()), *(categories or ()))):
        raise ValueError(f"{path}: not a COCO file: an image or category is not an object")
    names = {item.get("id"): item.get("name") for item in categories or () if _is_id(item.get("id"))}
    if not names or not all(isinstance(name, str) and name for name in names.values()):
        raise ValueError(f"{path}: not a COCO file: it needs categories, each with an id and a name")
    return images or [], names


def _box(annotation: dict[str, Any], names: dict[Any, str]) -> dict[str, Any]:
    category = annotation.get("category_id")
    if not _is_id(category) or category not in names:
        raise ValueError(f"its category_id {category!r:.80} is none of the file's categories")
    return {"bbox_2d": corners(annotation.get("bbox")), "label": names[category]}


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str)


def _tidy(number: int | float) -> int | float:
    rounded = round(number, 2)
    return int(rounded) if isinstance(rounded, float) and rounded.is_integer() else rounded
