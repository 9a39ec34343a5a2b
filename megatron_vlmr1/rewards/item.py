"""What a reward function is given, and how it says that it cannot judge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

Compat = Literal["none", "vlm-r1"]
Family = Literal["qwen2_5_vl", "internvl", "glm"]

MAX_TEXT_BYTES = 256 * 1024
"""A default reward refuses longer texts (UTF-8) with the failure `too_long`; it never cuts them."""

_LARGEST = 2**31 - 1


class RewardFailure(Exception):
    """There is no reward, and why. A failure is never a zero; the reason goes into a `Score`."""


@dataclass(frozen=True)
class RewardItem:
    """One completion and what it is judged against. Only text and small integers: it goes over a socket as it is.

    `family` says what the coordinates are: those of Qwen2.5-VL are pixels of the resized image, those of the others
    pixels of the original. The published rewards differ between models in more than that.
    """

    completion: str
    solution: str
    image_size: tuple[int, int] | None = None  # (width, height) of the original image, pixels
    grid_thw: tuple[int, int, int] | None = None  # patches the vision tower saw; None: coordinates are original pixels
    compat: Compat = "none"  # vlm-r1: the published value, quirks included
    family: Family = "qwen2_5_vl"  # whose coordinates and published rules are followed
    num_tokens: int | None = None  # length of the completion; the length reward needs it

    @classmethod
    def parse(cls, raw: object) -> RewardItem:
        """Build an item from decoded json or msgpack.

        Raises:
            ValueError: a key is unknown, missing or of the wrong type.
        """
        if not isinstance(raw, Mapping):
            raise ValueError("an item is an object with completion and solution")
        known = [field.name for field in fields(cls)]
        unknown = sorted(str(key) for key in raw if key not in known)
        if unknown:
            raise ValueError(f"unknown key {unknown[0][:40]}; known: {', '.join(known)}")
        size, grid = _integers(raw, "image_size", 2), _integers(raw, "grid_thw", 3)
        return cls(
            completion=_text(raw, "completion"),
            solution=_text(raw, "solution"),
            image_size=(size[0], size[1]) if size else None,
            grid_thw=(grid[0], grid[1], grid[2]) if grid else None,
            compat=_one_of(raw, "compat", "none", get_args(Compat)),
            family=_one_of(raw, "family", "qwen2_5_vl", get_args(Family)),
            num_tokens=_integer(raw, "num_tokens"),
        )

    def to_wire(self) -> dict[str, Any]:
        """Return the plain dict that `parse` reads; msgpack can carry it."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def check_length(text: str) -> None:
    """Refuse a text above MAX_TEXT_BYTES.

    Raises:
        RewardFailure: `too_long`.
    """
    # A character has at most four bytes, so most texts need no encoding to be seen as short enough.
    if len(text) * 4 > MAX_TEXT_BYTES and len(text.encode("utf-8", "surrogatepass")) > MAX_TEXT_BYTES:
        raise RewardFailure(f"too_long: more than {MAX_TEXT_BYTES} bytes of text")


def _text(raw: Mapping[Any, Any], key: str) -> str:
    value = raw.get(key)
    if not isinstance(value, str):
        raise ValueError(f"{key} must be a string")
    return value


def _one_of(raw: Mapping[Any, Any], key: str, default: str, known: tuple[str, ...]) -> Any:
    value = raw.get(key)
    if value is None:
        return default
    if value not in known:
        raise ValueError(f"{key} must be one of {', '.join(known)}")
    return value


def _integer(raw: Mapping[Any, Any], key: str) -> int | None:
    value = raw.get(key)
    if value is not None and (type(value) is not int or not 0 <= value <= _LARGEST):
        raise ValueError(f"{key} must be an integer, not negative")
    return value


def _integers(raw: Mapping[Any, Any], key: str, count: int) -> list[int] | None:
    value = raw.get(key)
    if value is None:
        return None
    if (
        not isinstance(value, (list, tuple))
        or len(value) != count
        or not all(type(number) is int and 0 <= number <= _LARGEST for number in value)
    ):
        raise ValueError(f"{key} must be {count} integers, none negative")
    return list(value)
