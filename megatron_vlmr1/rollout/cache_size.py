"""How large a key/value cache is made. No torch: plans ask too."""

from __future__ import annotations

from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class CacheSize:
    """Slots, and tokens of each."""

    prompts: int
    prompt_tokens: int
    rows: int  # a row is a completion
    row_tokens: int

    @property
    def tokens(self) -> int:
        """Tokens of key/value cache in all."""
        return self.prompts * self.prompt_tokens + self.rows * self.row_tokens

    def holds(self, other: CacheSize) -> bool:
        """Whether whatever fits a cache of the other size fits one of this size."""
        return all(mine >= theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True))


def fit(prompt_tokens: int, prompts: int, generations: int, row_tokens: int, budget: int) -> CacheSize | None:
    """Return a cache of at most `budget` tokens with as many rows as it can feed, or None if no completion fits.

    With fewer rows than completions there are prompt slots for twice as many groups as fill the rows, and one more:
    a few long completions hold their prompts, and without slots for others the rest of the rows would stand empty.
    What is left of the budget goes to slots.
    """
    for rows in range(min(prompts * generations, budget // row_tokens), 0, -1):
        groups = -(-rows // generations)
        slots = min(prompts, rows, groups if rows == prompts * generations else 2 * groups + 1)
        if rows <= generations:  # better one whole group than single completions of several
            slots = 1
        left = budget - rows * row_tokens
        if slots * prompt_tokens <= left:
            return CacheSize(min(prompts, rows, left // prompt_tokens), prompt_tokens, rows, row_tokens)
    return None
