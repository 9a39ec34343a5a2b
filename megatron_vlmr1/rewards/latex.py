r"""When two LaTeX answers are the same by their writing: the normal form of the MATH benchmark.

Source: Hendrycks et al. 2021 (arXiv 2103.03874), whose grader is used everywhere. Its oddities are kept, as the
published rewards depend on them: where it stumbles over one of the two texts, these are compared as they are.
"""

from __future__ import annotations

# In this order: each works on what those before it left.
_REPLACED = [
    ("\n", ""),
    ("\\!", ""),
    ("\\\\", "\\"),
    ("tfrac", "frac"),
    ("dfrac", "frac"),
    ("\\left", ""),
    ("\\right", ""),
    ("^{\\circ}", ""),
    ("^\\circ", ""),
    ("\\$", ""),
]


class NoBox(ValueError):
    """The text has a box that cannot be opened."""


def equivalent(a: str, b: str) -> bool:
    """Return whether two answers have the same normal form."""
    try:
        return normal_form(a) == normal_form(b)
    except ValueError:
        return a == b


def unboxed(text: str) -> str:
    r"""Return the content of the last ``\boxed``, or the text where there is none.

    Raises:
        NoBox: the box is an ``\fbox``, or no brace follows its name.
    """
    if "\\boxed " in text:
        return text.rpartition("\\boxed ")[2].partition("$")[0]
    start = text.rfind("\\boxed")
    start = text.rfind("\\fbox") if start < 0 else start
    end = _closing_brace(text, start) if start >= 0 else None
    if end is None:
        return text
    if not text.startswith("\\boxed{", start):
        raise NoBox("a box without a brace")
    return text[start + len("\\boxed{") : end]


def _closing_brace(text: str, start: int) -> int | None:
    depth = 0
    for position in range(start, len(text)):
        if text[position] == "{":
            depth += 1
        elif text[position] == "}":
            depth -= 1
            if depth == 0:
                return position
    return None


def normal_form(text: str) -> str:
    """Return the normal form of an answer.

    Raises:
        ValueError: where the benchmark's grader stumbles.
    """
    for old, new in _REPLACED:
        text = text.replace(old, new)
    text = _without_unit(text).replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if text.startswith("."):
        text = "0" + text
    name, equals, value = text.partition("=")
    if equals and len(name) <= 2 and "=" not in value:
        text = value
    text = _fractions_braced(_roots_braced(text).replace(" ", ""))
    return _slash_as_fraction("\\frac{1}{2}" if text == "0.5" else text)


def _without_unit(text: str) -> str:
    before, unit, after = text.partition("\\text{ ")
    if unit in after and unit:
        raise ValueError("two units")
    return before


def _roots_braced(text: str) -> str:
    """A root of one character gets the braces that it lacks."""
    first, *rest = text.split("\\sqrt")
    if "" in rest:
        raise ValueError("a root of nothing")
    return first + "".join("\\sqrt" + (part if part[0] == "{" else f"{{{part[0]}}}{part[1:]}") for part in rest)


def _fractions_braced(text: str) -> str:
    """A fraction of single characters gets the braces that it lacks; one cut short leaves the text as it is."""
    first, *rest = text.split("\\frac")
    braced = [first]
    for part in rest:
        if not part:
            raise ValueError("a fraction of nothing")
        if part[0] == "{":
            braced.append(part)
        elif len(part) < 2:
            return text
        else:
            braced.append(f"{{{part[0]}}}" + (part[1:] if part[1] == "{" else f"{{{part[1]}}}{part[2:]}"))
    return "\\frac".join(braced)


def _slash_as_fraction(text: str) -> str:
    parts = text.split("/")
    if len(parts) != 2:
        return text
    numerator, denominator = map(int, parts)
    written = text == f"{numerator}/{denominator}"
    return f"\\frac{{{numerator}}}{{{denominator}}}" if written else text
