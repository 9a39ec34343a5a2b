"""How a text answer and its truth are read: the published way, quirks included, and the house's way.

Everything is linear in the text.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import re2

from megatron_vlmr1.rewards import answers
from megatron_vlmr1.rewards.answers import DIGIT
from megatron_vlmr1.rewards.item import RewardFailure

_KEYWORDS = "答案 选择 正确 是 对 认为 应该 觉得 ANSWER CORRECT CHOOSE SELECT RIGHT THINK BELIEVE SHOULD".split()
_CAPITALS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
_NUMBER = re2.compile(rf"{DIGIT}+(?:[.,]{DIGIT}+)*")


def truth(solution: str) -> str:
    """Return the content of the solution's first answer block, or else the whole solution, stripped.

    Raises:
        RewardFailure: there is nothing in it but white space and full stops.
    """
    tagged = answers.answer(solution)
    found = solution.strip() if tagged is None else tagged
    if not plain(found):
        raise RewardFailure("the solution is empty")
    return found


def plain(text: str) -> str:
    """Return the text in lower case with single spaces and without full stops or spaces at its end."""
    return " ".join(text.split()).rstrip(" .").lower()


def numbers(text: str) -> list[str]:
    """Return the runs of digits of the text, with the points and commas between them, in order."""
    return [match.group() for match in _NUMBER.finditer(answers.encodable(text))]


def choice(text: str) -> str | None:
    """Return the capital letter of the one option that an answer names, or None.

    An option at the start is followed by one of ``) . :``. Elsewhere a letter in brackets or a capital before
    punctuation or the end is one, and several different ones are none.
    """
    bare = text.strip(" \t\r\n()[]*.,:").upper()
    if bare in _CAPITALS:
        return bare
    head = text.lstrip(" \t\r\n([*")[:2].upper()
    if head[:1] in _CAPITALS and head[1:] in (")", ".", ":", "]"):
        return head[0]
    text = answers.encodable(text)
    named = [letter for letter, option in _options().items() if option.search(text)]
    return named[0] if len(named) == 1 else None


@functools.cache
def _options() -> dict[str, Any]:
    """What names each option; one search a letter is faster than a look at every character."""
    after = r"[).,?!:;\]*}）。，！？：；】]"
    return {
        letter: re2.compile(rf"(?:^|[^\pL\pN'’_]){letter}(?:{after}|$)|\({letter.lower()}\)|\[{letter.lower()}\]")
        for letter in sorted(_CAPITALS)
    }


def clean_text(text: str) -> str:
    """Return the published normal form: content of the last answer block, line ends as spaces, lower case.

    A line end behind white space vanishes, any other becomes a space. One pass of full stops is cut from the end, so
    that a space before them stays.
    """
    tagged = answers.blocks(text, "answer")
    text = tagged[-1] if tagged else text
    for line_end in "\n\r":
        text = "".join(_joined(text.split(line_end)))
    return text.strip().rstrip(".").lower()


def _joined(parts: list[str]) -> Iterator[str]:
    yield parts[0]
    behind_space = parts[0][-1:].isspace()
    for part in parts[1:]:
        yield part if behind_space else " " + part
        behind_space = part[-1:].isspace() if part else True


def published_truth(solution: str) -> str:
    """Return the content of the first answer block that stands on one line, or else the whole solution, stripped."""
    for line in solution.split("\n"):
        inside = answers.first_block(line, "answer")
        if inside is not None:
            return inside.strip()
    return solution.strip()


def published_first(completion: str) -> str:
    """Return the content of the first answer block, or else the whole completion, stripped."""
    inside = answers.answer(completion)
    return completion.strip() if inside is None else inside


def published_last(completion: str) -> str:
    """Return the content of the last answer block, or else the whole completion, stripped."""
    tagged = answers.blocks(completion, "answer")
    return (tagged[-1] if tagged else completion).strip()


def published_choice(text: str) -> str | None:
    """Return the option that the published code sees in a text, or None.

    Candidates are letters that no letter A-Z precedes and punctuation or the end follows. Each time a candidate occurs
    it gathers the points that the *first* place of its letter in the text is worth; the first best one wins.
    """
    text = _single_spaced(text.upper())
    neighbours = zip(" " + text, text, text[1:] + ".", strict=False)
    found = Counter(
        letter
        for before, letter, after in neighbours
        if after in ".,?!:;" and letter in _CAPITALS and before not in _CAPITALS
    )
    if not found:
        return None
    # max takes the first of equals, and a Counter keeps the order of first occurrence.
    return max(found, key=lambda letter: found[letter] * _points(text, letter))


def _points(text: str, letter: str) -> int:
    position = text.find(letter)
    context = text[max(0, position - 20) : position + 20]
    points = sum(keyword in context for keyword in _KEYWORDS)
    points += 2 * (position > len(text) * 0.7)
    return points + (position + 1 < len(text) and text[position + 1] in "。.!！,，")


def _single_spaced(text: str) -> str:
    words = " ".join(text.split())
    if not words:
        return text[:1] and " "
    return " " * text[0].isspace() + words + " " * text[-1].isspace()
