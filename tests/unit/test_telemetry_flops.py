"""FLOP formulas against torch's counter over transformers' own Qwen2.5-VL."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_vlmr1.models.shape import TextShape, VisionShape
from megatron_vlmr1.plan.shapes import read_plan_shape
from megatron_vlmr1.telemetry.flops import causal_pairs, language_flops, vision_flops, vision_pairs

TEXT = TextShape(
    hidden_size=128,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    ffn_hidden_size=320,
    vocab_size=512,
    tied=False,
    norm_eps=1e-6,
    rope_theta=1e6,
    mrope_section=(4, 6, 6),
    max_positions=4096,
)
TOWER = VisionShape(
    depth=4,
    hidden_size=64,
    num_heads=4,
    intermediate_size=176,
    out_hidden_size=128,
    patch_size=14,
    temporal_patch_size=2,
    in_channels=3,
    spatial_merge_size=2,
    window_size=112,
    full_attention_blocks=(1,),
)


@pytest.fixture(scope="module")
def model():
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text, tower = TEXT, TOWER
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "intermediate_size": text.ffn_hidden_size,
            "num_hidden_layers": text.num_layers,
            "num_attention_heads": text.num_heads,
            "num_key_value_heads": text.num_kv_heads,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
            "bos_token_id": 505,
            "eos_token_id": 504,
            "pad_token_id": 505,
        },
        vision_config={
            "depth": tower.depth,
            "hidden_size": tower.hidden_size,
            "intermediate_size": tower.intermediate_size,
            "num_heads": 4,
            "out_hidden_size": tower.out_hidden_size,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": list(tower.full_attention_blocks),
        },
        image_token_id=500,
        video_token_id=501,
        vision_start_token_id=502,
        vision_end_token_id=503,
    )
    config._attn_implementation = "sdpa"
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def counted(function):
    """FLOPs as torch counts them; attention as plain matrix products, which the counter sees."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize(("tokens", "share"), [(96, 0.1), (1024, 0.5)])
def test_language(model, tokens, share):
    """The counter sees the whole square of a masked attention, so it is whole squares that are compared."""
    logit_tokens = 10
    ids = torch.randint(0, 490, (1, tokens))

    def forward():
        return model(input_ids=ids, logits_to_keep=logit_tokens, use_cache=False).logits

    ours = language_flops(TEXT, tokens, tokens**2, logit_tokens)
    attention = ours - language_flops(TEXT, tokens, 0, logit_tokens)
    assert attention / ours > share  # the long one: more than half of all
    with torch.no_grad():
        assert ours == pytest.approx(counted(forward), rel=0.01)
    assert 3 * ours == pytest.approx(counted(lambda: forward().sum().backward()), rel=0.01)


# The last ones: windows cut at both edges, frames, a full-attention block that outweighs the rest.
@pytest.mark.parametrize("grids", [[(1, 16, 16)], [(1, 10, 22), (1, 4, 6)], [(2, 12, 8)], [(1, 46, 34), (3, 6, 10)]])
def test_vision(model, grids):
    patches = sum(t * h * w for t, h, w in grids)
    pixels = torch.randn(patches, 1176)

    def forward():
        return model.model.visual(pixels, grid_thw=torch.tensor(grids)).pooler_output

    ours = vision_flops(TOWER, grids)
    with torch.no_grad():
        assert ours == pytest.approx(counted(forward), rel=0.01)
    pixels_gradient = 2 * patches * TOWER.patch_dim * TOWER.hidden_size  # nobody asks for it
    measured = counted(lambda: forward().sum().backward())
    assert 3 * ours - pixels_gradient == pytest.approx(measured, rel=0.01)


def test_a_published_tower_hardly_needs_the_gradient_of_pixels():
    tower = read_plan_shape("qwen2.5-vl-3b").vision
    assert 2 * 46 * 34 * tower.patch_dim * tower.hidden_size < 0.001 * 3 * vision_flops(tower, [(1, 46, 34)])


def test_pairs_by_counting():
    grids = [(1, 10, 22), (2, 4, 6)]
    windowed = full = 0
    for frames, height, width in grids:
        cells = [(y, x) for y in range(height) for x in range(width)]
        for query in cells:
            full += frames * len(cells)
            windowed += frames * sum(a[0] // 8 == query[0] // 8 and a[1] // 8 == query[1] // 8 for a in cells)
    assert vision_pairs(TOWER, grids) == (windowed, full)
    prompt, completions = 5, [3, 4]
    visible = sum(range(1, prompt + 1)) + sum(prompt + i + 1 for length in completions for i in range(length))
    assert causal_pairs(prompt) + sum(causal_pairs(length, prompt) for length in completions) == visible
