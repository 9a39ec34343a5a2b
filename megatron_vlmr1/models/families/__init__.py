"""One file per model family: shapes and names from its config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_vlmr1.models.families import qwen2_5_vl
from megatron_vlmr1.models.shape import VlmShape

_FAMILIES = {"qwen2_5_vl": qwen2_5_vl}


def read_shape(directory: Path) -> VlmShape:
    """Read a Hugging Face directory's config.json.

    Raises:
        ValueError: no or broken config.json, an unknown family, or a missing number.
    """
    path = directory / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: not found; expected a Hugging Face model directory") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    family = config.get("model_type") if isinstance(config, dict) else None
    if family not in _FAMILIES:
        raise ValueError(f"{path}: model_type {family!r} is not supported; known: {', '.join(_FAMILIES)}")
    try:
        return _FAMILIES[family].read_shape(config)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: missing or malformed {error}") from error
