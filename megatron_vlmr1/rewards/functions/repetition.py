"""How much a completion repeats itself: repeated boxes of a json list, or runs of six words. Range [-1, 0].

Broken json is mended by json_repair, within REPAIR_S and for up to MAX_REPAIR_CHARACTERS.

Mended in the default mode:
- the json of the answer block counts, where there is one, not that of the thoughts before it;
- beside a list of boxes the thoughts are looked at too, and the worse of both counts;
- boxes are compared as numbers, 1 and 1.0 being the same, and labels without case or white space around them;
- what is no object in the list is passed over instead of ending in an error, and so is json too deep to read.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Hashable
from itertools import islice
from typing import Any

import re2

from megatron_vlmr1.rewards import answers
from megatron_vlmr1.rewards.answers import SPACE
from megatron_vlmr1.rewards.deadline import within
from megatron_vlmr1.rewards.item import RewardFailure, RewardItem, check_length

WORDS = 6
"""Length of the runs of words."""

MAX_REPAIR_CHARACTERS = 16_000
"""Longest text that json_repair is given. The published value of a longer one is a failure; the default mode takes it
for plain text."""

REPAIR_S = 0.25

_LIST = re2.compile(rf'(?s)\[{SPACE}*\{{.*?"bbox_2d".*?"label".*?\}}{SPACE}*\]')


def score(item: RewardItem) -> float:
    """Return minus the share of repetitions, in [-1, 0].

    Raises:
        RewardFailure: too_long; for the published value, too_hard to repair, or where the published code raises.
    """
    if item.compat == "vlm-r1":
        return _published(item.completion)
    check_length(item.completion)
    answer = answers.answer(item.completion)
    data = _read(_json_of(item.completion if answer is None else answer))
    found = [_key(entry) for entry in data if isinstance(entry, dict) and {"bbox_2d", "label"} <= entry.keys()]
    if not found:
        return _penalty(_runs(item.completion))
    return min(_penalty(found), _penalty(_runs(item.completion.partition("<answer>")[0])))


def _published(text: str) -> float:
    source = _json_of(text)
    data = None
    try:
        data = json.loads(source) if source else None
    except json.JSONDecodeError:
        data = _repaired(source)
    except (ValueError, RecursionError) as error:
        raise RewardFailure(f"the published reward raises {type(error).__name__}: json.loads") from error
    if not data or not isinstance(data, list):
        return _penalty(_runs(text))
    try:
        return _penalty([f"{e['bbox_2d']}_{e['label']}" for e in data if "bbox_2d" in e and "label" in e])
    except (TypeError, RecursionError) as error:
        raise RewardFailure(f"the published reward raises {type(error).__name__}: not a list of objects") from error


def _read(source: str) -> list[Any]:
    """The list that a text holds, mended where that is possible, or an empty one."""
    try:
        data = json.loads(source)
    except json.JSONDecodeError:
        try:
            data = _repaired(source)
        except RewardFailure:
            data = None
    except (ValueError, RecursionError):
        data = None
    return data if isinstance(data, list) else []


def _json_of(text: str) -> str:
    """What the first json fence holds, or else the first fence, or else the first list of boxes; maybe nothing."""
    json_fence = next(answers.enclosed(text, "```json", "```"), None)
    if json_fence is not None:
        return json_fence.strip()
    if fenced := next(answers.enclosed(text, "```", "```"), "").strip():
        return fenced
    match = _LIST.search(answers.encodable(text))
    return text[slice(*match.span())] if match else ""


def _repaired(source: str) -> Any:
    """What json_repair makes of a text; None where it makes nothing.

    Raises:
        RewardFailure: too_hard.
    """
    if len(source) > MAX_REPAIR_CHARACTERS:
        raise RewardFailure(f"too_hard: json to repair of more than {MAX_REPAIR_CHARACTERS} characters")
    from json_repair import repair_json

    try:
        return within(REPAIR_S, lambda: json.loads(repair_json(source)))
    except RewardFailure:
        raise
    except Exception:  # the published code asks no more of a library that promises nothing about hostile text
        return None


def _key(entry: dict[str, Any]) -> Hashable:
    box, label = entry["bbox_2d"], entry["label"]
    label = label.strip().lower() if isinstance(label, str) else repr(label)
    return repr([_number(value) for value in box] if isinstance(box, list) else box), label


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, int) and abs(value) < 2**53 else value


def _runs(text: str) -> list[tuple[str, ...]]:
    words = text.lower().split()
    return list(zip(*(islice(words, start, None) for start in range(WORDS)), strict=False))


def _penalty(found: Collection[Hashable]) -> float:
    return -(1 - len(set(found)) / len(found)) if found else 0.0
