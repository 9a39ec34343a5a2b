"""Rows of VLM-R1 jsonl files: what a row must hold, and its images from under the given folder."""

from __future__ import annotations

import errno
import io
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from megatron_vlmr1.data import images

MAX_LINE_BYTES = 16 << 20
MAX_IMAGE_BYTES = 256 << 20
METHOD = "accu_reward_method"  # VLM-R1's name for a row's own accuracy reward
_IMAGES = ("image", "images")
_QUESTIONS = ("question", "problem")
_TRUTHS = ("solution", "answer")


class BadRow(ValueError):
    """A source row that cannot become a sample, with the reason."""


@dataclass(frozen=True)
class Row:
    """One parsed row: text, and its images: names, or the compressed bytes where the source holds them."""

    question: str
    solution: str
    images: tuple[str | bytes, ...]
    extra: dict[str, Any]


class Look(NamedTuple):
    """What an image's header says; width and height are those of the upright picture."""

    size_bytes: int
    width: int
    height: int
    suffix: str  # jpg, png or webp


def lines(file: BinaryIO, start: int = 0, end: int | None = None) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, line) of the lines of a jsonl file that begin at `start` or later and before `end`.

    `start` must be where a line begins. A line longer than MAX_LINE_BYTES comes as its first MAX_LINE_BYTES + 1
    bytes, for `parse` to refuse. The mark that some editors put at the beginning of a file is taken off.
    """
    file.seek(start)
    while (end is None or start < end) and (line := file.readline(MAX_LINE_BYTES + 1)):
        skip_line(file, line)
        begin, start = start, file.tell()
        yield begin, line if begin else line.removeprefix(b"\xef\xbb\xbf")


def skip_line(file: BinaryIO, rest: bytes) -> None:
    """Read on to the end of the line of which `rest` was read, without keeping it."""
    while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
        rest = file.readline(MAX_LINE_BYTES + 1)


def parse(line: bytes) -> Row:
    """Check one jsonl row and take it apart, as `from_object` says.

    Raises:
        BadRow: broken JSON, wrong types, an empty question or truth.
    """
    if len(line) > MAX_LINE_BYTES:
        raise BadRow(f"line is longer than {MAX_LINE_BYTES} bytes")
    try:
        row = json.loads(line, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"not JSON: {error}") from error
    return from_object(row)


def from_object(row: Any) -> Row:
    """Check one row and take it apart: VLM-R1's `conversations`, or `question` (`problem`) and `solution` (`answer`).

    `<image>` markers are stripped from the question; the solution is what the answer tags hold, or all of it
    where there are none. A solution that is a number or a list counts as its JSON text. Keys that are none of these,
    nor `image` or `images`, are kept in `extra`.

    Raises:
        BadRow: wrong types, an empty question or truth.
    """
    if not isinstance(row, dict):
        raise BadRow("a row must be a JSON object")
    try:
        json.dumps(row, ensure_ascii=False, default=lambda _: None).encode()  # None: the bytes of an image
    except UnicodeEncodeError as error:
        raise BadRow("text is not valid Unicode (lone surrogate)") from error
    used = ["conversations"]
    if "conversations" in row or not any(key in row for key in _QUESTIONS):
        question, truth = _turns(row.get("conversations"))
    else:
        keys = [next((key for key in names if key in row), names[0]) for names in (_QUESTIONS, _TRUTHS)]
        question, truth = (_text(row.get(key), key, lists=key in _TRUTHS) for key in keys)
        used = keys
    image = next((key for key in _IMAGES if row.get(key) is not None), "image")
    names = _image_names(row.get(image))
    extra = {key: value for key, value in row.items() if key not in (*used, *_IMAGES)}
    question = question.replace("<image>", "").strip()
    solution = _untagged(truth)
    if not question:
        raise BadRow("the question is empty")
    if not solution:
        raise BadRow("the truth is empty")
    return Row(question, solution, names, extra)


def look(root: Path, image: str | bytes, max_pixels: int = images.MAX_PIXELS) -> Look:
    """Read an image's header only; `image` is its bytes or a path under `root`, a resolved directory.

    Raises:
        BadRow: the path leaves the root, the file is missing, or it is no acceptable image.
    """
    with _open(root, image) as file:
        try:
            width, height, kind = images.upright_header(file, max_pixels)
        except ValueError as error:
            raise BadRow(f"{_name(image)}: {error}") from error
        return Look(file.seek(0, os.SEEK_END), width, height, images.SUFFIXES[kind])


def load_image(root: Path, image: str | bytes, max_pixels: int = images.MAX_PIXELS) -> tuple[bytes, str]:
    """Read an image; its header is checked, its pixels are not decoded.

    Returns:
        (compressed bytes, member suffix: jpg, png or webp).

    Raises:
        BadRow: as `look`.
    """
    with _open(root, image) as file:
        try:
            data = file.read()
        except OSError as error:
            raise BadRow(f"{_name(image)} cannot be read: {error}") from error
    try:
        _, _, kind = images.header(data, max_pixels)
    except ValueError as error:
        raise BadRow(f"{_name(image)}: {error}") from error
    return data, images.SUFFIXES[kind]


def _name(image: str | bytes) -> str:
    return "the image in the row" if isinstance(image, bytes) else f"image {image!r}"


def _open(root: Path, image: str | bytes) -> BinaryIO:
    if isinstance(image, bytes):
        return io.BytesIO(image)
    if os.path.isabs(image) or ".." in Path(image).parts or "\0" in image:
        raise BadRow(f"image path {image!r} must be relative, without ..")
    try:
        path = (root / image).resolve(strict=True)
        if not path.is_relative_to(root):
            raise BadRow(f"image {image!r} is a link out of the image folder")
        return _open_regular(path)
    except FileNotFoundError as error:
        raise BadRow(f"image {image!r} is missing") from error
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise BadRow(f"image {image!r} cannot be read: {error}") from error


def _open_regular(path: Path) -> BinaryIO:
    # Not to follow a link that has just replaced the file, nor to wait for a pipe's writer.
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")
    try:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        if status.st_size > MAX_IMAGE_BYTES:
            raise OSError(errno.EFBIG, f"larger than {MAX_IMAGE_BYTES} bytes")
    except OSError:
        file.close()
        raise
    return file


def _turns(conversations: Any) -> tuple[str, str]:
    if not isinstance(conversations, list) or len(conversations) != 2:
        raise BadRow("conversations must be a list of two turns, human and gpt")
    values = []
    for turn, who in zip(conversations, ("human", "gpt"), strict=True):
        if not isinstance(turn, dict) or turn.get("from") != who:
            raise BadRow(f"a {who} turn is missing from conversations")
        values.append(_text(turn.get("value"), f"the value of the {who} turn", lists=who == "gpt"))
    return values[0], values[1]


def _text(value: Any, what: str, lists: bool) -> str:
    if lists and isinstance(value, list):
        if None in value:
            raise BadRow(f"{what} holds an empty value")
        value = json.dumps(value, ensure_ascii=False)  # a box as JSON
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadRow(f"{what} must be text")
    return str(value)


def _untagged(truth: str) -> str:
    _, opened, rest = truth.partition("<answer>")
    inside, closed, _ = rest.partition("</answer>")
    return (inside if opened and closed else truth).strip()


def _image_names(image: Any) -> tuple[str | bytes, ...]:
    names = [] if image is None else [image] if isinstance(image, str | bytes) else image
    if not isinstance(names, list) or not all(isinstance(name, str | bytes) and name for name in names):
        raise BadRow("image must be a file name or a list of file names")
    return tuple(names)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
