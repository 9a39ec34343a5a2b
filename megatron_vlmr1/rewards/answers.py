"""The one convention for what a completion says: tags and boxes. Training, evaluation and the report all read it here.

A completion is ``<think> … </think> <answer> … </answer>``; of several blocks the first counts. Everything here is
linear in the text: it is written by a model that may be trained against it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import re2

from megatron_vlmr1.rewards.boxes import Box

# Python's white space and digits for str patterns, spelled out because re2's own \s and \d know ASCII only.
SPACE = r"[\t-\r\x1c- \x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}]"
DIGIT = r"\p{Nd}"

_NUMBER = r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
_BOX = re2.compile(rf"\[{SPACE}*" + rf"{SPACE}*,{SPACE}*".join([f"({_NUMBER})"] * 4) + rf"{SPACE}*\]")


def encodable(text: str) -> str:
    """Return the text with each lone surrogate replaced by a question mark, as re2 reads UTF-8 only."""
    return text.encode("utf-8", "replace").decode("utf-8")


def enclosed(text: str, opening: str, closing: str) -> Iterator[str]:
    """Yield what stands between each `opening` and the nearest `closing` behind it, in order."""
    position = 0
    while (start := text.find(opening, position)) >= 0:
        end = text.find(closing, start + len(opening))
        if end < 0:
            return
        yield text[start + len(opening) : end]
        position = end + len(closing)


def blocks(text: str, tag: str) -> list[str]:
    """Return what stands inside each ``<tag>…</tag>``, in order; an opening tag reaches to the nearest closing one."""
    return list(enclosed(text, f"<{tag}>", f"</{tag}>"))


def first_block(text: str, tag: str) -> str | None:
    """Return what stands inside the first ``<tag>…</tag>``, or None."""
    return next(enclosed(text, f"<{tag}>", f"</{tag}>"), None)


def thought(text: str) -> str | None:
    """Return the content of the first think block, stripped."""
    inside = first_block(text, "think")
    return None if inside is None else inside.strip()


def answer(text: str) -> str | None:
    """Return the content of the first answer block, stripped."""
    inside = first_block(text, "answer")
    return None if inside is None else inside.strip()


def well_formed(text: str) -> bool:
    """Exactly one think block, then exactly one answer block, and nothing but white space around them."""
    text = text.strip()
    if any(text.count(tag) != 1 for tag in ("<think>", "</think>", "<answer>", "</answer>")):
        return False
    if not (text.startswith("<think>") and text.endswith("</answer>")):
        return False
    between = text.partition("</think>")[2].partition("<answer>")
    return bool(between[1]) and not between[0].strip()


def box(text: str) -> Box | None:
    """Return the first ``[a, b, c, d]`` of four numbers (x1, y1, x2, y2), or None; None too when one is not finite."""
    match = _BOX.search(encodable(text))
    if match is None:
        return None
    x1, y1, x2, y2 = (float(number) for number in match.groups())
    return (x1, y1, x2, y2) if all(map(math.isfinite, (x1, y1, x2, y2))) else None
