"""Whether two formulas are equal, by math_verify (sympy), kept off what would hang it.

Hopeless input is refused before it is parsed, as sympy evaluates a power of integers in one operation that no signal
interrupts; the rest is bounded by `deadline.within`. The screen cannot know everything: what slips through holds the
process until the reward service kills it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import re2

from megatron_vlmr1.rewards import answers
from megatron_vlmr1.rewards.answers import DIGIT, SPACE
from megatron_vlmr1.rewards.deadline import within
from megatron_vlmr1.rewards.item import RewardFailure

MAX_CHARACTERS = 8000
"""Longest text that is parsed: math_verify's patterns need 0.3 s for one of many numbers, and four times that for twice
as many."""

MAX_DIGITS = 4300
"""Most digits in a text: as many as Python turns into an integer."""

MAX_DEPTH = 200
"""Most brackets inside each other: the parser recurses."""

_MAX_POWERS = 200
_MAX_EXPONENT_CHARACTERS = 200
_MAX_RESULT_DIGITS = 1_000_000  # of an integer power: some 0.1 s

_POWER = r"(?:\^|\*\*)"
_POWERS = re2.compile(_POWER)
_OPEN, _CLOSE = rf"(?:[{{(\[+-]|{SPACE})*", rf"(?:[}})\]]|{SPACE})*"
# 9^9^9, 9^{9^9}, (9^9)^9
_TOWER = re2.compile(rf"{DIGIT}{_CLOSE}{_POWER}{_OPEN}{DIGIT}+{_CLOSE}{_POWER}{_OPEN}{DIGIT}")
_FACTORIAL = re2.compile(rf"{DIGIT}{{5}}{_CLOSE}!|!{_CLOSE}!")
_INTEGER = re2.compile(rf"{DIGIT}+")
_MAY_HOLD_ONE = re2.compile(rf"[$\\\[]|{DIGIT}")


def may_hold_formula(text: str) -> bool:
    """Return False where math_verify is known to find nothing: all its patterns need a digit or LaTeX."""
    return _MAY_HOLD_ONE.search(answers.encodable(text)) is not None


def equal(answer: str, truth: str, seconds: float) -> bool:
    """Return whether the last formula of one text is equal to that of the other, as the published rewards ask it.

    Raises:
        RewardFailure: `too_hard`: refused, or out of time (`seconds`; in the main thread, see `deadline.within`).
    """
    if not (may_hold_formula(truth) and may_hold_formula(answer)):
        return False
    refuse_hopeless(truth)
    refuse_hopeless(answer)
    parse, verify = _library()

    def verified() -> bool:
        expected = parse(truth, parsing_timeout=None)
        found = parse(answer, parsing_timeout=None) if expected else []
        return bool(verify(found, expected, timeout_seconds=None))

    try:
        return within(seconds, verified)
    except RewardFailure:
        raise
    except Exception as error:  # three libraries on hostile text: whatever they stumble over
        raise RewardFailure(f"too_hard: {type(error).__name__} in math_verify") from error


def equal_bare(answer: str, truth: str, seconds: float) -> bool:
    """Return `equal` of two formulas whose LaTeX may lack its dollar signs.

    Raises:
        RewardFailure: as `equal`.
    """
    marked = _in_dollars(answer), _in_dollars(truth)
    if "\\" in answer + truth or truth.count("=") > 1:
        return equal(*marked, seconds)  # as they are, only the last numbers would be found: 3 for 3\pi, 2 for x=3, y=2
    if equal(answer, truth, seconds / 2):
        return True
    return marked != (answer, truth) and equal(*marked, seconds / 2)


def _in_dollars(text: str) -> str:
    delimited = any(sign in text for sign in ("$", "\\(", "\\["))
    return f"${text}$" if not delimited and ("\\" in text or "^" in text or text.count("=") > 1) else text


@functools.cache
def _library() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from math_verify import parse, verify

    # Its own limits are switched off for ours, about which it would warn.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    # Compiles its patterns and imports most of sympy, which is not the first item's fault.
    verify(*(parse(f"${text}$", parsing_timeout=None) for text in ("(x+1)^2", "x^2+2x+1")), timeout_seconds=None)
    return parse, verify


def refuse_hopeless(text: str) -> None:
    """Refuse what sympy would not finish.

    Raises:
        RewardFailure: `too_hard`, and what of it is.
    """
    if len(text) > MAX_CHARACTERS:
        raise RewardFailure(f"too_hard: a formula of more than {MAX_CHARACTERS} characters")
    text = answers.encodable(text)
    digits = sum(map(str.isdigit, text))
    if digits > MAX_DIGITS:
        raise RewardFailure(f"too_hard: more than {MAX_DIGITS} digits")
    if _depth(text) > MAX_DEPTH:
        raise RewardFailure(f"too_hard: more than {MAX_DEPTH} brackets inside each other")
    if _TOWER.search(text) or _FACTORIAL.search(text):
        raise RewardFailure("too_hard: a power of a power, or a factorial, of numbers")
    if digits * _largest_power(text) > _MAX_RESULT_DIGITS:
        raise RewardFailure("too_hard: a large exponent")


def _depth(text: str) -> int:
    depth = deepest = 0
    for letter in text:
        if letter in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif letter in ")]}":
            depth = max(0, depth - 1)
    return deepest


def _largest_power(text: str) -> int:
    """Return an upper bound on any power in the text, where powers of brackets are taken to be powers of powers."""
    signs = list(_POWERS.finditer(text))
    if len(signs) > _MAX_POWERS:
        raise RewardFailure(f"too_hard: more than {_MAX_POWERS} powers")
    largest = of_brackets = 1
    for sign in signs:
        power = _product(_exponent(text, sign.end()))
        if text[: sign.start()].rstrip()[-1:] in (")", "]", "}"):
            of_brackets *= power
        else:
            largest = max(largest, power)
    return largest * of_brackets


def _exponent(text: str, start: int) -> str:
    """Return what stands behind a power sign: one bracket with all inside, or what comes before the next operator."""
    while text[start : start + 1].isspace():
        start += 1
    depth = 0
    for end in range(start, min(len(text), start + _MAX_EXPONENT_CHARACTERS)):
        if text[end] in "([{":
            depth += 1
        elif text[end] in ")]}":
            depth -= 1
        outside = depth == 0 and end > start and not (text[end].isalnum() or text[end] in "\\.")
        if depth < 0 or outside:
            return text[start:end]
    if len(text) > start + _MAX_EXPONENT_CHARACTERS:
        raise RewardFailure(f"too_hard: an exponent of more than {_MAX_EXPONENT_CHARACTERS} characters")
    return text[start:]


def _product(exponent: str) -> int:
    """Return the product of the integers in an exponent, at least 1; it need not go on once it is too large."""
    if "!" in exponent:
        raise RewardFailure("too_hard: a factorial in an exponent")
    product = 1
    for match in _INTEGER.finditer(exponent):
        product *= int(match.group().lstrip("0")[:10] or "1")
        if product > _MAX_RESULT_DIGITS:
            break
    return product
