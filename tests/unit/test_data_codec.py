"""Groups as bytes and back, and bytes that are none."""

from __future__ import annotations

from dataclasses import fields, replace

import msgpack
import numpy as np
import pytest

from megatron_vlmr1.data.codec import from_bytes, to_bytes
from megatron_vlmr1.data.packing import PackedGroup
from megatron_vlmr1.types import Completion, Group, Prompt, Score
from tests.checkpoints import random_image


def a_group() -> Group:
    image = random_image(0, 4, 6)
    ids = np.arange(9, dtype=np.int64)
    prompt = Prompt(
        7, "key", ids, np.stack([ids, ids + 1, ids + 2]), (image, random_image(1, 2, 2)), "ä \ud800?", "[1]"
    )
    completions = (
        Completion(np.array([1, 2**40]), np.array([-0.5, -1e-30], np.float32), "stop", "a\x00b"),
        Completion(np.array([3]), np.array([-7], np.float32), "length", ""),
    )
    scores = (Score(0.1, {"iou": 0.1, "format": 0.0}), Score(None, failure="deadline"))
    return Group(prompt, completions, scores, np.array([0.25, np.nan], np.float32))


def same(a: object, b: object) -> None:
    assert type(a) is type(b)
    if isinstance(a, np.ndarray):
        assert isinstance(b, np.ndarray) and (a.dtype, a.shape) == (b.dtype, b.shape) and a.tobytes() == b.tobytes()
    elif isinstance(a, tuple):
        assert isinstance(b, tuple)
        for x, y in zip(a, b, strict=True):
            same(x, y)
    elif hasattr(a, "__dataclass_fields__"):
        for f in fields(a):  # type: ignore[arg-type]
            same(getattr(a, f.name), getattr(b, f.name))
    else:
        assert a == b


def test_every_bit_comes_back():
    group = a_group()
    (found, packed) = from_bytes(to_bytes([group, PackedGroup(group.prompt, (np.array([1, 2]),), (5,))]))
    same(group, found)
    same(packed, PackedGroup(group.prompt, (np.array([1, 2]),), (5,)))
    assert found.completions[0].token_ids.flags.writeable
    empty = replace(group, completions=(), scores=(), advantages=None, prompt=replace(group.prompt, images=()))
    same(from_bytes(to_bytes(empty)), empty)


def test_pixels_are_nearly_all_of_it():
    group = a_group()
    pixels = sum(image.patches.nbytes for image in group.prompt.images)
    assert pixels < len(to_bytes(group)) < pixels + 2000


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"": "Popen", "args": ["x"]}, "no noun is named 'Popen'"),
        ({"": ["Score"]}, "no noun is named"),
        ({"": "Score", "value": 1.0, "colour": 3}, "not a Score"),
        ({"": "Score", "parts": {}}, "not a Score"),
        ({"": "Score", "value": None}, "not a Score: a score is a value or a failure"),
        ({"": "array", "dtype": "<i8", "shape": [2], "data": b"1234567"}, "shape"),
        ({"": "array", "dtype": "<i8", "shape": [-1], "data": b"12345678"}, "shape"),
        ({"": "array", "dtype": "|O", "shape": [1], "data": b"12345678"}, "not an array"),
        ({"": "array", "dtype": "<f4", "shape": [True], "data": b"1234"}, "shape"),
    ],
)
def test_what_is_no_group_is_refused(value, says):
    with pytest.raises(ValueError, match=says):
        from_bytes(msgpack.packb(value))


@pytest.mark.parametrize("damage", [lambda d: d[:-1], lambda d: d + b"\x00", lambda d: b"", lambda d: b"\xc1" + d])
def test_torn_bytes_are_refused(damage):
    with pytest.raises(ValueError):
        from_bytes(damage(to_bytes(a_group())))
