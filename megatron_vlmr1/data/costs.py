"""What prompts and completions cost: FLOPs of language tokens and of images, from their true lengths and sizes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megatron_vlmr1.models.shape import VlmShape
from megatron_vlmr1.telemetry.flops import causal_pairs, language_flops, vision_flops
from megatron_vlmr1.types import Prompt


def forward_language(shape: VlmShape, prompt: Prompt, lengths: Sequence[int]) -> int:
    """Return the language model's FLOPs for a prompt once and its completions behind it.

    A packed forward pass and generation with a cache are the same work: each token but a completion's last is fed
    once and sees what lies before it, and every token of a completion is predicted once.

    Args:
        shape: the model's numbers.
        prompt: image tokens count like others.
        lengths: tokens of each completion, its stop token included; none of them is no work at all.
    """
    if not lengths:
        return 0
    n = len(prompt.token_ids)
    tokens = n + sum(length - 1 for length in lengths)
    pairs = causal_pairs(n) + sum(causal_pairs(length - 1, n) for length in lengths)
    return language_flops(shape.text, tokens, pairs, sum(lengths))


def forward_vision(shape: VlmShape, prompts: Iterable[Prompt]) -> int:
    """Return the tower's FLOPs for each unique image of some prompts once, windowed and full attention apart."""
    grids = {image.digest: image.grid_thw for prompt in prompts for image in prompt.images}
    return vision_flops(shape.vision, list(grids.values()))


def update_cost(shape: VlmShape, prompt: Prompt, lengths: Sequence[int], freeze_vision: bool) -> int:
    """Return the FLOPs by which work is shared out; a backward pass is twice that for either part.

    A frozen tower costs nothing here: its embeddings are computed once, outside the update's passes.
    """
    tower = 0 if freeze_vision or not lengths else forward_vision(shape, [prompt])
    return forward_language(shape, prompt, lengths) + tower
