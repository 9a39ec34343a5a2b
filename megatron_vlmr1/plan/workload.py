"""What a step is made of: prompts, images and completions of average size, and how they are packed. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from megatron_vlmr1.config import Config
from megatron_vlmr1.models.shape import VisionShape, padded
from megatron_vlmr1.plan.load import largest_grid
from megatron_vlmr1.telemetry.flops import causal_pairs, vision_pairs


@dataclass(frozen=True)
class Workload:
    """A step's prompts, all alike, and their completions."""

    prompts: int  # of a step, all ranks
    generations: int  # completions of a prompt
    prompt_tokens: float  # image tokens among them
    grid: tuple[int, int] | None  # patch rows and columns of the one image of a prompt
    completion_tokens: float  # on average, the stop token included
    longest_completion: int  # most that a completion may have


def grid_of(vision: VisionShape, tokens: float) -> tuple[int, int] | None:
    """Return patch rows and columns of a nearly square image with about so many tokens; None with less than one."""
    if tokens < 1:
        return None
    rows = max(1, round(math.sqrt(tokens)))
    merge = vision.spatial_merge_size
    return rows * merge, max(1, round(tokens / rows)) * merge


def workload(
    cfg: Config,
    vision: VisionShape | None,
    prompt_tokens: float | None = None,
    image_tokens: float | None = None,
    completion_tokens: float | None = None,
) -> Workload:
    """Return a config's step; what is not given is as large as the config allows (`plan.load`).

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
    if image_tokens is not None and not 0 <= image_tokens <= prompt:
        raise ValueError(f"--image-tokens {image_tokens:g}: from 0 to the {prompt:g} tokens of its prompt")
    grid = None
    if vision is not None:
        _, rows, columns = largest_grid(cfg, vision)
        grid = (rows, columns) if image_tokens is None else grid_of(vision, image_tokens)
        if grid and grid[0] * grid[1] // vision.merge_unit > prompt:
            found = grid[0] * grid[1] // vision.merge_unit
            raise ValueError(f"an image of {found} tokens in a prompt of {prompt:g}: say how many with --image-tokens")
    elif image_tokens:
        raise ValueError(f"--image-tokens {image_tokens:g}: a text model sees no images")
    return Workload(
        prompts=cfg.train.prompts_per_step,
        generations=cfg.rollout.num_generations if cfg.method == "grpo" else 1,
        prompt_tokens=float(prompt),
        grid=grid,
        completion_tokens=float(completion),
        longest_completion=cfg.rollout.max_new_tokens,
    )


@dataclass(frozen=True)
class Packed:
    """A rank's micro-batches, all alike; the numbers are of one."""

    count: int  # without the empty ones with which the interleaved schedule fills its last turn
    images: float  # that go through the tower
    tokens: float
    pairs: float  # (query, key), useful ones
    labels: float


@lru_cache(maxsize=4096)
def packed(work: Workload, copies: int, budget: int, at_least: int, multiple: int) -> Packed:
    """Pack a rank's share of a step as `data.packing` does.

    Args:
        work: the step.
        copies: data-parallel ranks.
        budget: tokens of a micro-batch, at most.
        at_least: micro-batches, where there are that many groups.
        multiple: their tokens are a multiple of this.
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
    # Parts are alike: what `data.bins.fill` comes to is the fewest bins of so many that all have room for their share.
    number, fitting = groups * cuts, max(1, budget // part)
    bins = max(-(-number // fitting), min(number, at_least))
    each = number / bins
    pairs = _pairs(prompt) + rows * _pairs(fed, prompt)
    return Packed(
        count=bins,
        images=each if work.grid else 0.0,
        tokens=padded(math.ceil(each * part), multiple),
        pairs=each * pairs,
        labels=each * rows * work.completion_tokens,
    )


def _pairs(new: float, past: float = 0.0) -> float:
    return float(causal_pairs(round(new), round(past)))


def tower_pairs(vision: VisionShape, grid: tuple[int, int]) -> tuple[int, int]:
    """Return (query, key) pairs of an image in a windowed and in a full-attention block."""
    return vision_pairs(vision, [(1, *grid)])
