"""How the published rewards clean a text before they compare it."""

from __future__ import annotations

from megatron_vlmr1.rewards import answers


def clean_text(text: str) -> str:
    """Return the last answer block, else the whole text: line breaks replaced, stripped, lower case.

    A line break behind white space vanishes, any other becomes a space. Final dots go after the stripping, so that
    white space before them stays.
    """
    tagged = answers.blocks(text, "answer")
    text = tagged[-1] if tagged else text
    for line_break in "\n\r":
        head, *rest = text.split(line_break)
        pieces, before = [head], head[-1:]
        for part in rest:
            pieces.append(part if before.isspace() else " " + part)
            before = part[-1:] or line_break
        text = "".join(pieces)
    return text.strip().rstrip(".").lower()
