"""From positions of the stream to prompts: what a reader is, and the one that works in the rank itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from megatron_vlmr1.data.handover import Item
from megatron_vlmr1.data.prompts import PromptBuilder
from megatron_vlmr1.data.stream import Stream
from megatron_vlmr1.types import Damage, Sample


class Reader(Protocol):
    """Builds the prompts of a rank's positions."""

    def read(self, positions: Sequence[int]) -> list[Item]:
        """Return for each of the stream's next positions of this rank its prompt and sample, or the damage."""

    def close(self) -> None:
        """End what was started for it."""


class Inline:
    """Reads and builds when it is asked, in this process."""

    def __init__(self, stream: Stream, builder: PromptBuilder) -> None:
        self._stream, self._builder = stream, builder

    def read(self, positions: Sequence[int]) -> list[Item]:
        """Return for each position its prompt and sample, or the damage.

        Raises:
            ValueError: as `PromptBuilder.build`.
        """
        return [build(self._builder, position, self._stream.read(position)) for position in positions]

    def close(self) -> None:
        """Do nothing: nothing was started."""


def build(builder: PromptBuilder, position: int, sample: Sample | Damage) -> Item:
    """Return the prompt of a sample with the sample, whose compressed images have done their work.

    Raises:
        ValueError: as `PromptBuilder.build`.
    """
    if isinstance(sample, Damage):
        return sample
    prompt = builder.build(position, sample)
    return prompt if isinstance(prompt, Damage) else (prompt, replace(sample, images=()))
