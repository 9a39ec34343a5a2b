"""The nouns: what travels from room to room.

``Sample`` (what a shard holds) -> ``Prompt`` (tokens and patches) -> ``Completion`` (sampled tokens) ->
``Score`` (a value or a failure) -> ``Group`` (one prompt, its completions, scores and advantages).
All are frozen and free of torch, so that reward and data processes can use them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Sample:
    """One row of a shard, as it lies there: text and compressed images."""

    key: str
    question: str
    solution: str
    images: tuple[bytes, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Damage:
    """A position of the data order whose sample could not be delivered."""

    shard: str
    key: str
    reason: str
    too_long: bool = False  # nothing is wrong with the sample: its prompt is longer than data.max_prompt_tokens


@dataclass(frozen=True)
class ImagePatches:
    """One image, resized and cut into the vision tower's patches.

    A still image fills all frames of a temporal patch alike; one is kept, and the tower repeats it.
    """

    patches: FloatArray  # [grid_h * grid_w, channels, patch * patch], Hugging Face order
    grid_thw: tuple[int, int, int]  # in patches
    size: tuple[int, int]  # (width, height) in pixels of the original image
    digest: bytes  # sha256 of the compressed image: equal digests are the same image


@dataclass(frozen=True)
class Prompt:
    """One question, ready for the model."""

    position: int  # global position in the data order; identifies the prompt within a run
    key: str
    token_ids: IntArray  # [T]
    mrope_positions: IntArray  # [3, T]: temporal, height, width
    images: tuple[ImagePatches, ...]
    question: str
    truth: str
    accuracy: str | None = None  # name of the row's own accuracy reward

    @property
    def next_position(self) -> int:
        """The M-RoPE position of the first completion token (all three rows)."""
        return int(self.mrope_positions.max()) + 1 if self.mrope_positions.size else 0


@dataclass(frozen=True)
class Completion:
    """One sampled answer."""

    token_ids: IntArray  # [L], the stop token included
    logprobs: FloatArray  # [L], at T=1 over the vocabulary less the banned tokens
    finish_reason: FinishReason
    text: str
    drawn_logprobs: FloatArray | None = None  # [L], under the distribution drawn from, where it is not that one


@dataclass(frozen=True)
class Score:
    """What a reward says of a completion: a value, or why there is none. A failure is never a zero."""

    value: float | None
    parts: Mapping[str, float] = field(default_factory=dict)  # unweighted value of each named part
    failure: str | None = None

    def __post_init__(self) -> None:
        assert (self.value is None) != (self.failure is None), "a score is a value or a failure"


@dataclass(frozen=True)
class Group:
    """One prompt with its completions; scores and advantages follow as they become known."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    scores: tuple[Score, ...] = ()
    advantages: FloatArray | None = None  # [len(completions)]; NaN where the score failed
