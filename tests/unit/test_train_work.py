"""FLOPs of a step against a count by hand, product by product; utilisation from them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megatron_vlmr1 import config
from megatron_vlmr1.data.costs import update_cost
from megatron_vlmr1.data.packing import PackedGroup
from megatron_vlmr1.models.mrope import mrope_positions
from megatron_vlmr1.models.shape import VlmShape
from megatron_vlmr1.telemetry.flops import peak_flops, utilisation, vision_flops
from megatron_vlmr1.train.work import step_flops, trained
from megatron_vlmr1.types import Completion, Group, ImagePatches, Prompt
from tests.checkpoints import random_image
from tests.unit.test_telemetry_flops import TEXT, TOWER

SHAPE = VlmShape("qwen2_5_vl", TEXT, TOWER, 500, 501, 502)
IMAGES = random_image(0, 8, 12), random_image(1, 4, 4)


def settings(**sections: object) -> config.Config:
    return config.parse({"model": {"path": "-"}, "data": {"train": "-"}, **sections}, "test")


def group(position: int, text: int, images: tuple[ImagePatches, ...], lengths: list[int], failed: int) -> Group:
    ids = np.concatenate([np.arange(text), *(np.full(len(image.patches) // 4, 500) for image in images)])
    positions = mrope_positions(ids, [image.grid_thw for image in images], 500, 2)
    completions = tuple(Completion(np.zeros(n, np.int64), np.zeros(n, np.float32), "stop", "") for n in lengths)
    advantages = np.array([np.nan] * failed + [1.0] * (len(lengths) - failed), np.float32)
    return Group(Prompt(position, "k", ids, positions, images, "", ""), completions, (), advantages)


def groups() -> list[Group]:
    return [
        group(0, 5, IMAGES, [4, 1, 7], failed=1),
        group(1, 3, IMAGES[:1], [2, 2], failed=0),
        group(2, 9, (random_image(2, 2, 6),), [3, 5], failed=2),  # generated, never trained on
    ]


def by_hand(prompt_tokens: int, lengths: list[int]) -> int:
    """Multiply and add token by token: a prompt's tokens, then those of each completion but its last."""
    if not lengths:
        return 0
    seen = [i + 1 for i in range(prompt_tokens)]
    for length in lengths:
        seen += [prompt_tokens + i + 1 for i in range(length - 1)]
    total = 0
    for keys in seen:
        projections = 128 * (4 * 32) + 2 * 128 * (2 * 32) + (4 * 32) * 128 + 3 * 128 * 320
        attention = 4 * 32 * keys * 2  # scores, and the weighted sum of values
        total += 3 * 2 * (projections + attention)
    return total + 2 * sum(lengths) * 128 * 512


N = 5 + 24 + 4, 3 + 24, 9 + 3  # tokens of the prompts
GENERATED = by_hand(N[0], [4, 1, 7]) + by_hand(N[1], [2, 2]) + by_hand(N[2], [3, 5])
TRAINED = by_hand(N[0], [1, 7]) + by_hand(N[1], [2, 2])
ALL_IMAGES = vision_flops(TOWER, [(1, 8, 12), (1, 4, 4), (1, 2, 6)])  # the first image is in two prompts
TRAINED_IMAGES = vision_flops(TOWER, [(1, 8, 12), (1, 4, 4)])


@pytest.mark.parametrize(
    ("beta", "iterations", "passes", "tower_passes"),
    # passes: the reference's, the one for old log-probs, and three for forward and backward of each optimizer step
    [(0.0, 1, 3, 3), (0.04, 1, 1 + 3, 1 + 3), (0.0, 2, 1 + 6, 6), (0.04, 4, 1 + 1 + 12, 1 + 12)],
)
def test_a_step_of_grpo(beta, iterations, passes, tower_passes):
    cfg = settings(grpo={"beta": beta, "num_iterations": iterations})
    expected = GENERATED + passes * TRAINED, ALL_IMAGES + tower_passes * TRAINED_IMAGES
    assert step_flops(groups(), groups(), SHAPE, cfg) == expected
    frozen = cfg.model_copy(update={"model": cfg.model.model_copy(update={"freeze_vision": True})})
    assert step_flops(groups(), groups(), SHAPE, frozen) == (expected[0], ALL_IMAGES)


def test_a_step_of_sft():
    items = [PackedGroup(g.prompt, (g.completions[0].token_ids,), (0,)) for g in groups()]
    language = 3 * (by_hand(N[0], [4]) + by_hand(N[1], [2]) + by_hand(N[2], [3]))
    assert step_flops(items, items, SHAPE, settings(method="sft")) == (language, 3 * ALL_IMAGES)
    assert step_flops([], [], SHAPE, settings(method="sft")) == (0, 0)


def test_what_an_update_costs():
    first = groups()[0]
    assert trained(first) == [1, 7]
    language = by_hand(N[0], [1, 7])
    assert update_cost(SHAPE, first.prompt, [1, 7], freeze_vision=True) == language
    assert update_cost(SHAPE, first.prompt, [1, 7], freeze_vision=False) == language + TRAINED_IMAGES
    assert update_cost(SHAPE, first.prompt, [], freeze_vision=False) == 0
    twice = replace(first.prompt, images=(IMAGES[0], IMAGES[0]))
    assert update_cost(SHAPE, twice, [3], False) - update_cost(SHAPE, twice, [3], True) == vision_flops(
        TOWER, [(1, 8, 12)]
    )


def test_utilisation():
    found = utilisation(6e15, 2e15, seconds=4.0, ranks=2, peak=1e15)
    assert found == {"perf/tflops": 1000.0, "perf/mfu_lm": 0.75, "perf/mfu_vit": 0.25}
    assert utilisation(6e15, 2e15, 4.0, 2) == {"perf/tflops": 1000.0}


def test_no_peak_is_invented():
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == peak_flops("NVIDIA H200", "bf16") == 989e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "fp32") is None
    assert peak_flops("NVIDIA A10", "bf16") is None and peak_flops(None, "bf16") is None


def test_what_is_generated_and_dropped_costs_its_generation_only():
    drawn = groups()
    cfg = settings(grpo={"beta": 0.0})
    whole, without = step_flops(drawn, drawn, SHAPE, cfg), step_flops(drawn, drawn[:1], SHAPE, cfg)
    assert whole[0] - without[0] == 3 * by_hand(N[1], [2, 2])
    assert whole[1] == without[1]  # the second group's image is in the first as well
