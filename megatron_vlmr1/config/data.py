"""Settings of the data."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from megatron_vlmr1.config.section import NonNegativeInt, PositiveFloat, PositiveInt, Section

ONE_SET, MIXTURE = "(one set)", "(mixture)"
"""Forms of `data.train`; pydantic puts them among the keys of an error."""


class SourceConfig(Section):
    """One set of shards of a mixture."""

    path: str
    """Directory or URL of indexed WebDataset shards."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Share of the samples that are drawn from this set, next to the weights of the others."""


def _source_kind(value: Any) -> str:
    return MIXTURE if isinstance(value, list | tuple) else ONE_SET


class DataConfig(Section):
    """Where samples come from and how they become prompts."""

    train: Annotated[
        Annotated[str, Tag(ONE_SET)] | Annotated[list[SourceConfig], Field(min_length=1), Tag(MIXTURE)],
        Discriminator(_source_kind),
    ]
    """Directory or URL of indexed WebDataset shards; or a list of {path, weight}, drawn from in that proportion, each
    set with epochs of its own."""
    evaluate: dict[str, str] = {}
    """Named splits, each a directory or URL of indexed shards; names go into file names: letters, digits, _ . -"""
    lanes: PositiveInt = 8
    """Fixed number of lanes of the data order; the data-parallel size must divide it."""
    shuffle_window: PositiveInt = 1024
    """Samples of a lane are permuted within windows of this many."""
    min_pixels: PositiveInt | None = None
    """Smallest image area after resizing; the checkpoint's own when empty."""
    max_pixels: PositiveInt | None = None
    """Largest image area after resizing; the checkpoint's own when empty."""
    max_prompt_tokens: PositiveInt = 2048
    """Image tokens included."""
    long_prompts: Literal["drop", "error"] = "drop"
    """What becomes of a longer prompt. drop: it is left out of its batch and written to the ledger; error: the run ends
    with a line that names it."""
    system_prompt: str | None = None
    """System message of the chat; the chat template's own when empty."""
    workers: NonNegativeInt = 0
    """Processes of each rank that read, decode and build prompts ahead; 0 leaves it to the rank, when it needs them."""
    prefetch: PositiveInt = 32
    """Prompts of a rank that its workers may be ahead."""
    prefetch_bytes: PositiveInt = 1 << 30
    """Memory for these; one prompt in the making counts as data.max_prompt_tokens image tokens."""
    worker_timeout_s: PositiveFloat = 120.0
    """A worker that says nothing for so long while the rank waits for it is replaced."""
    cache_dir: str | None = None
    """Local folder for the shards of URLs, shared by the ranks of a node; needed where a path is a URL."""
    cache_bytes: PositiveInt = 50 * 10**9
    """Size of that folder at most; what was used longest ago makes room."""
    fetch_timeout_s: PositiveFloat = 30.0
    """A server that is silent for so long has failed; after three times that shard's samples are lost for a while."""

    @field_validator("evaluate")
    @classmethod
    def _check_names(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not re.fullmatch(r"[\w.-]{1,100}", name, re.ASCII):
                raise ValueError(f"split {name!r:.120}: letters, digits, _ . and - only, at most 100")
        return value

    @property
    def sources(self) -> tuple[tuple[str, float], ...]:
        """Return (path, weight) of each set to train on."""
        if isinstance(self.train, str):
            return ((self.train, 1.0),)
        return tuple((source.path, source.weight) for source in self.train)
