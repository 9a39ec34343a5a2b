"""One file per model family: what its config.json says, and which tensors make up each parameter.

A family is known as soon as its file lies here under its `model_type`. What such a file has to define is `Family`.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol, cast

from megatron_vlmr1.models.pieces import Piece
from megatron_vlmr1.models.shape import VisionShape, VlmShape


class Family(Protocol):
    """A module of this package."""

    ALIASES: tuple[tuple[str, str], ...]
    """Beginnings of names that transformers writes besides the published ones, and what they stand for."""
    VISION_PREFIX: str
    """What precedes the names of the tower's parameters in their published names."""

    def read_shape(self, config: dict[str, Any]) -> VlmShape:
        """Return the numbers of a config.json; a number that it lacks is a KeyError."""
        ...

    def tensor_shapes(self, shape: VlmShape) -> dict[str, tuple[int, ...]]:
        """Return every tensor of the model under its published name, with its shape."""
        ...

    def vision_shapes(self, v: VisionShape) -> dict[str, tuple[int, ...]]:
        """Return the parameters of our own tower, with their shapes."""
        ...

    def text_pieces(self, shape: VlmShape, name: str, layer: int | None, tp_rank: int, tp: int) -> list[Piece]:
        """Return what makes up one parameter of the language model on one tensor-parallel rank.

        Args:
            shape: the model.
            name: Megatron's, within the decoder layer, or of the whole language model where `layer` is None.
            layer: number in the whole model.
            tp_rank: rank in the tensor-parallel group.
            tp: size of the tensor-parallel group.
        """
        ...


def known() -> list[str]:
    """Return the `model_type` of every family."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def of(shape: VlmShape) -> Family:
    """Return the family of a model."""
    return _module(shape.family)


def read_shape(directory: Path) -> VlmShape:
    """Read a Hugging Face directory's config.json.

    Raises:
        ValueError: no or broken config.json, an unknown family, or a missing number.
    """
    path = directory / "config.json"
    config = _config(path)
    family = config.get("model_type")
    if family not in known():
        raise ValueError(f"{path}: model_type {family!r} is not supported; known: {', '.join(known())}")
    try:
        shape = _module(family).read_shape(config)
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: missing or malformed {error}") from error
    _check_numbers(shape, path)
    return shape


def _check_numbers(shape: VlmShape, path: Path) -> None:
    for part in (shape.text, shape.vision):
        for field in fields(part):
            value = getattr(part, field.name)
            if field.type == "int" and (type(value) is not int or value < 1):
                raise ValueError(f"{path}: missing or malformed {field.name}: {value!r} is not a positive whole number")


def aliases(directory: Path) -> tuple[tuple[str, str], ...]:
    """Return the `ALIASES` of a Hugging Face directory's family; none where no config.json names a known one."""
    path = directory / "config.json"
    family = _config(path).get("model_type") if path.is_file() else None
    return _module(family).ALIASES if family in known() else ()


def published_name(name: str, aliases: tuple[tuple[str, str], ...]) -> str:
    """Return the published name of a tensor, whichever transformers wrote it."""
    for alias, published in aliases:
        if name.startswith(alias):
            return published + name.removeprefix(alias)
    return name


def _module(family: str) -> Family:
    return cast(Family, importlib.import_module(f"{__name__}.{family}"))


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: not found; expected a Hugging Face model directory") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    return config if isinstance(config, dict) else {}
