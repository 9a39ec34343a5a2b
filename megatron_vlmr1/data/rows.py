"""Rows of VLM-R1 jsonl files: what a row must hold, and its images from under the given folder."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megatron_vlmr1.data import images

MAX_LINE_BYTES = 16 << 20
MAX_IMAGE_BYTES = 256 << 20
METHOD = "accu_reward_method"  # VLM-R1's name for a row's own accuracy reward
_OWN_KEYS = frozenset({"image", "conversations"})


class BadRow(ValueError):
    """A source row that cannot become a sample, with the reason."""


@dataclass(frozen=True)
class Row:
    """One parsed row: text, and the names of its images."""

    question: str
    solution: str
    images: tuple[str, ...]
    extra: dict[str, Any]


def lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, line) of a jsonl file, blank lines left out.

    A line longer than MAX_LINE_BYTES comes as its first MAX_LINE_BYTES + 1 bytes, for `parse` to refuse.
    """
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        rest = line
        while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
            rest = file.readline(MAX_LINE_BYTES + 1)
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield number, line


def parse(line: bytes) -> Row:
    """Check one jsonl row and take it apart.

    `<image>` markers are stripped from the question; the solution is what the answer tags hold, or all of it
    where there are none. A solution that is a number or a list counts as its JSON text. Keys other than `image` and
    `conversations` are kept in `extra`.

    Raises:
        BadRow: broken JSON, wrong types, an empty question or truth.
    """
    if len(line) > MAX_LINE_BYTES:
        raise BadRow(f"line is longer than {MAX_LINE_BYTES} bytes")
    try:
        row = json.loads(line, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise BadRow("a row must be a JSON object")
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise BadRow("text is not valid Unicode (lone surrogate)") from error
    question, truth = _turns(row.get("conversations"))
    question = question.replace("<image>", "").strip()
    solution = _untagged(truth)
    if not question:
        raise BadRow("the question is empty")
    if not solution:
        raise BadRow("the truth is empty")
    extra = {key: value for key, value in row.items() if key not in _OWN_KEYS}
    return Row(question, solution, _image_names(row.get("image")), extra)


def load_image(root: Path, name: str, max_pixels: int = images.MAX_PIXELS) -> tuple[bytes, str]:
    """Read an image from under `root`, a resolved directory; its header is checked, its pixels are not decoded.

    Returns:
        (compressed bytes, member suffix: jpg, png or webp).

    Raises:
        BadRow: the path leaves the root, the file is missing, or it is no acceptable image.
    """
    if os.path.isabs(name) or ".." in Path(name).parts or "\0" in name:
        raise BadRow(f"image path {name!r} must be relative, without ..")
    try:
        path = (root / name).resolve(strict=True)
        if not path.is_relative_to(root):
            raise BadRow(f"image {name!r} is a link out of the image folder")
        data = _read_regular(path)
    except FileNotFoundError as error:
        raise BadRow(f"image {name!r} is missing") from error
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise BadRow(f"image {name!r} cannot be read: {error}") from error
    try:
        _, _, kind = images.header(data, max_pixels)
    except ValueError as error:
        raise BadRow(f"image {name!r}: {error}") from error
    return data, images.SUFFIXES[kind]


def _read_regular(path: Path) -> bytes:
    # Not to follow a link that has just replaced the file, nor to wait for a pipe's writer.
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        if status.st_size > MAX_IMAGE_BYTES:
            raise OSError(errno.EFBIG, f"larger than {MAX_IMAGE_BYTES} bytes")
        return file.read()


def _turns(conversations: Any) -> tuple[str, str]:
    if not isinstance(conversations, list) or len(conversations) != 2:
        raise BadRow("conversations must be a list of two turns, human and gpt")
    values = []
    for turn, who in zip(conversations, ("human", "gpt"), strict=True):
        if not isinstance(turn, dict) or turn.get("from") != who:
            raise BadRow(f"a {who} turn is missing from conversations")
        value = turn.get("value")
        if who == "gpt" and isinstance(value, list):
            value = json.dumps(value, ensure_ascii=False)  # a box as JSON
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise BadRow(f"the value of the {who} turn must be text")
        values.append(str(value))
    return values[0], values[1]


def _untagged(truth: str) -> str:
    _, opened, rest = truth.partition("<answer>")
    inside, closed, _ = rest.partition("</answer>")
    return (inside if opened and closed else truth).strip()


def _image_names(image: Any) -> tuple[str, ...]:
    names = [] if image is None else [image] if isinstance(image, str) else image
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise BadRow("image must be a file name or a list of file names")
    return tuple(names)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
