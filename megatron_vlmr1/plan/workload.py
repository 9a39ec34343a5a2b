"""What a step is made of: prompts, images and completions of average size, and how they are packed. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from megatron_vlmr1.config import Config
from megatron_vlmr1.data.bins import fill
from megatron_vlmr1.models.shape import VisionShape, padded
from megatron_vlmr1.telemetry.flops import causal_pairs, vision_pairs

_SQUARE_SHARE = 0.5  # of a prompt that is an image, at most, where the config says no size


@dataclass(frozen=True)
class Workload:
    """A step's prompts, all alike, and their completions."""

    prompts: int  # of a step, all ranks
    generations: int  # completions of a prompt
    prompt_tokens: float  # image tokens among them
    image_tokens: float  # of the one image of a prompt; 0 is none
    completion_tokens: float  # on average, the stop token included
    longest_completion: int  # most that a completion may have

    def grid(self, vision: VisionShape | None) -> tuple[int, int] | None:
        """Return patch rows and columns of an image with about `image_tokens`, nearly square; None without one."""
        if vision is None or self.image_tokens < 1:
            return None
        rows = max(1, round(math.sqrt(self.image_tokens)))
        columns = max(1, round(self.image_tokens / rows))
        return rows * vision.spatial_merge_size, columns * vision.spatial_merge_size


def workload(
    cfg: Config,
    vision: VisionShape | None,
    prompt_tokens: float | None = None,
    image_tokens: float | None = None,
    completion_tokens: float | None = None,
) -> Workload:
    """Return a config's step; what is not given is as large as the config allows.

    An image is then of `data.max_pixels`, or half of the longest prompt where that is empty or more.

    Raises:
        ValueError: more than the config allows.
    """
    limits = {"prompt": cfg.data.max_prompt_tokens, "completion": cfg.rollout.max_new_tokens}
    prompt = limits["prompt"] if prompt_tokens is None else prompt_tokens
    completion = limits["completion"] if completion_tokens is None else completion_tokens
    for name, value in (("prompt", prompt), ("completion", completion)):
        if not 1 <= value <= limits[name]:
            key = "data.max_prompt_tokens" if name == "prompt" else "rollout.max_new_tokens"
            raise ValueError(f"--{name}-tokens {value:g}: from 1 to {key}={limits[name]}")
    if vision is None:
        image = 0.0
    elif image_tokens is None:
        pixels = vision.patch_size**2 * vision.merge_unit  # of a token
        largest = math.inf if cfg.data.max_pixels is None else cfg.data.max_pixels // pixels
        image = largest if largest < prompt else _SQUARE_SHARE * prompt
    else:
        image = image_tokens
    if image > prompt:
        raise ValueError(f"--image-tokens {image:g}: more than the {prompt:g} tokens of a prompt")
    return Workload(
        prompts=cfg.train.prompts_per_step,
        generations=cfg.rollout.num_generations if cfg.method == "grpo" else 1,
        prompt_tokens=float(prompt),
        image_tokens=float(image),
        completion_tokens=float(completion),
        longest_completion=cfg.rollout.max_new_tokens,
    )


@dataclass(frozen=True)
class Packed:
    """A rank's micro-batches, all alike; the numbers are of one."""

    count: int
    empty: int  # besides them, so that the interleaved schedule goes round in whole turns
    prompts: float  # repeated ones counted
    images: float  # that go through the tower
    tokens: float
    pairs: float  # (query, key), useful ones
    labels: float


@lru_cache(maxsize=4096)
def packed(work: Workload, copies: int, budget: int, at_least: int, turns: int, multiple: int) -> Packed:
    """Pack a rank's share of a step as `data.packing` does.

    Args:
        work: the step.
        copies: data-parallel ranks.
        budget: tokens of a micro-batch, at most.
        at_least: micro-batches, where there are that many groups.
        turns: their number is a multiple of this.
        multiple: and their tokens of this.
    """
    groups = -(-work.prompts // copies)
    prompt, fed = work.prompt_tokens, work.completion_tokens - 1
    whole = prompt + work.generations * fed
    budget = budget // multiple * multiple
    cuts = 1
    if whole > budget and work.generations > 1:
        room = max(1, int((budget - prompt) // max(1.0, fed)))
        cuts = -(-work.generations // room)
    rows = work.generations / cuts  # completions of a part, on average
    part = math.ceil(prompt + rows * fed)
    bins = fill([1] * (groups * cuts), [part] * (groups * cuts), budget, at_least)
    each = groups * cuts / len(bins)
    pairs = _pairs(prompt) + rows * _pairs(fed, prompt)
    return Packed(
        count=len(bins),
        empty=-len(bins) % turns,
        prompts=each,
        images=each if work.image_tokens >= 1 else 0.0,
        tokens=padded(math.ceil(each * part), multiple),
        pairs=each * pairs,
        labels=each * rows * work.completion_tokens,
    )


def _pairs(new: float, past: float = 0.0) -> float:
    return float(causal_pairs(round(new), round(past)))


def tower_pairs(vision: VisionShape, grid: tuple[int, int]) -> tuple[int, int]:
    """Return (query, key) pairs of an image in a windowed and in a full-attention block."""
    return vision_pairs(vision, [(1, *grid)])
