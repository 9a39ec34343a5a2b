"""Groups as bytes, between ranks and on disk: msgpack of plain values and raw arrays. Nothing is ever unpickled.

A noun is a map with its class under the empty key; whatever fields it has travel with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import msgpack  # type: ignore[import-untyped]
import numpy as np

from megatron_vlmr1.data.packing import PackedGroup
from megatron_vlmr1.types import Completion, Group, ImagePatches, Prompt, Score

_NOUNS: dict[str, Any] = {c.__name__: c for c in (Group, PackedGroup, Prompt, ImagePatches, Completion, Score)}
_DTYPES = {"<i8", "<f4"}  # of `types.IntArray` and `types.FloatArray`
_TAG = ""
_ARRAY = "array"


def to_bytes(value: Any) -> bytes:
    """Return nouns, arrays and plain values (None, bool, int, float, str, bytes, sequences, text maps) as bytes."""
    data = msgpack.packb(_plain(value), unicode_errors="surrogatepass")
    assert isinstance(data, bytes)
    return data


def from_bytes(data: bytes) -> Any:
    """Return what `to_bytes` was given; sequences come back as tuples, arrays writable.

    Raises:
        ValueError: not exactly one value of the kinds above, or an array whose length is not that of its shape.
    """
    return msgpack.unpackb(data, object_hook=_noun, use_list=False, strict_map_key=True, unicode_errors="surrogatepass")


def _plain(value: Any) -> Any:
    if type(value) in _NOUNS.values():
        return {_TAG: type(value).__name__, **{f.name: _plain(getattr(value, f.name)) for f in fields(value)}}
    if isinstance(value, np.ndarray):
        assert value.dtype.str in _DTYPES, value.dtype
        return {_TAG: _ARRAY, "dtype": value.dtype.str, "shape": list(value.shape), "data": value.tobytes()}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        assert _TAG not in value
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _noun(found: dict[str, Any]) -> Any:
    name = found.pop(_TAG, None)
    if name is None:
        return found
    if name == _ARRAY:
        return _array(found)
    noun = _NOUNS.get(name) if isinstance(name, str) else None
    if noun is None:
        raise ValueError(f"no noun is named {name!r}")
    try:
        return noun(**found)
    except (TypeError, AssertionError) as error:
        raise ValueError(f"not a {name}: {error}") from error


def _array(found: dict[str, Any]) -> Any:
    dtype, shape, data = (found.get(key) for key in ("dtype", "shape", "data"))
    if dtype not in _DTYPES or not isinstance(shape, tuple) or not isinstance(data, bytes):
        raise ValueError("not an array of whole numbers or single-precision floats")
    if not all(type(n) is int and n >= 0 for n in shape) or len(data) != math.prod(shape) * np.dtype(dtype).itemsize:
        raise ValueError(f"an array of shape {shape} in {len(data)} bytes")
    return np.frombuffer(data, dtype).reshape(shape).copy()
