"""FLOP formulas against torch's counter over our own model: a packed group with images, its log-probs, backward."""

from __future__ import annotations

import numpy as np
import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_vlmr1.data.costs import forward_language
from megatron_vlmr1.data.packing import PackedGroup, model_input, pack
from megatron_vlmr1.grpo.update import label_tensors
from megatron_vlmr1.telemetry.flops import causal_pairs, language_flops, vision_flops
from tests.checkpoints import mixed_prompts, write_random_checkpoint
from tests.distributed import ranks, work

GENERATIONS, LENGTH = 4, 257


def test_a_packed_group(tmp_path):
    directory = write_random_checkpoint(tmp_path / "model")
    with ranks.alone() as mesh, sdpa_kernel(SDPBackend.MATH):
        policy = work.load_policy(directory, mesh)
        prompt = mixed_prompts(directory)[3]  # images of 4 x 6 and 20 x 10 patches
        completions = tuple(np.full(LENGTH, 7 + i) for i in range(GENERATIONS))
        batch = pack([PackedGroup(prompt, completions, tuple(range(GENERATIONS)))], policy.shape.image_token_id, 1)
        with FlopCounterMode(display=False) as counter:
            hidden = policy.model(model_input(batch, policy))
            logprobs, _ = policy.logprobs(hidden, *label_tensors(batch))
            forward = counter.get_total_flops()
            logprobs.sum().backward()
            both = counter.get_total_flops()
    text, tower = policy.shape.text, policy.shape.vision
    n, fed, labels = len(prompt.token_ids), LENGTH - 1, GENERATIONS * LENGTH
    tokens = n + GENERATIONS * fed
    useful = causal_pairs(n) + GENERATIONS * causal_pairs(fed, n)
    # Plain matrix products take the whole square of the prompt, and of each completion with the prompt before it.
    computed = n**2 + GENERATIONS * fed * (n + fed)
    language = language_flops(text, tokens, computed, labels)
    vision = vision_flops(tower, [image.grid_thw for image in prompt.images])
    assert forward == pytest.approx(language + vision, rel=0.01)
    assert forward_language(policy.shape, prompt, [LENGTH] * GENERATIONS) == language_flops(
        text, tokens, useful, labels
    )
    # Backward makes logits again instead of keeping them, and nobody asks for the gradient of pixels.
    logits = 2 * labels * text.hidden_size * text.vocab_size
    patches = sum(len(image.patches) for image in prompt.images)
    pixels = 2 * patches * tower.patch_dim * tower.hidden_size
    assert both == pytest.approx(3 * (language + vision) + logits - pixels, rel=0.01)
