"""What is recommended: accepted by the program's own rules, in memory, and as quick as any setting that fits."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from megatron_vlmr1 import config
from megatron_vlmr1.config import decoding_layout
from megatron_vlmr1.plan import hardware, search
from megatron_vlmr1.plan.memory import rank_memory
from megatron_vlmr1.plan.recommend import ALIKE, Recommendation, check, misfit, recommend, room
from megatron_vlmr1.plan.shapes import PlanShape, read_plan_shape
from megatron_vlmr1.plan.time import program, step_time
from megatron_vlmr1.plan.workload import workload

ROOT = Path(__file__).resolve().parents[2]
H100 = hardware.read(ROOT / "configs" / "hardware" / "h100-80gb.yaml")


def recipe(size: str, *overrides: str) -> tuple[config.Config, PlanShape]:
    return config.load(ROOT / "configs" / "recipe" / f"{size}.yaml", overrides), read_plan_shape(f"qwen2.5-vl-{size}")


def recommended(size: str, gpus: int, *overrides: str) -> tuple[config.Config, PlanShape, Recommendation]:
    cfg, shape = recipe(size, *overrides)
    return cfg, shape, recommend(cfg, shape, H100, gpus, workload(cfg, shape.vision))


@pytest.mark.parametrize(
    ("size", "gpus", "overrides"),
    [
        ("3b", 6, ()),  # six GPUs, sixteen prompts
        ("7b", 8, ()),
        ("32b", 16, ()),
        ("72b", 64, ()),
        ("72b", 128, ()),
        ("72b", 1024, ()),
        ("72b", 1024, ("train.prompts_per_step=512",)),
        ("3b", 8, ("method=sft", "grpo.beta=0")),
    ],
)
def test_choices_are_accepted_when_typed(size, gpus, overrides):
    cfg, shape, found = recommended(size, gpus, *overrides)
    assert len(found.choices) == 2
    first, second = found.choices
    assert first.time.seconds <= second.time.seconds * (1 + ALIKE)
    sizes = [
        (p.tensor_model_parallel_size, p.pipeline_model_parallel_size)
        for p in (choice.setting.parallel for choice in found.choices)
    ]
    assert sizes[0] != sizes[1]
    for choice in found.choices:
        # As somebody would type them: through YAML, the overrides' syntax and all validators.
        words = [*overrides, *choice.setting.overrides(cfg)]
        typed, _ = recipe(size, *words)
        assert typed == choice.setting.of(cfg)
        check(typed, shape, gpus)
        assert not misfit(rank_memory(typed, shape, gpus), H100, 8)
        assert choice.peak <= room(H100) == 0.9 * 80e9
        how = program(typed, shape.text.num_layers, gpus, 8)
        assert step_time(H100, shape, how, workload(typed, shape.vision)).seconds == choice.time.seconds
        assert typed.parallel.tensor_model_parallel_size <= 8
        if (layout := decoding_layout(typed)) is not None:
            assert typed.parallel.ranks_of_a_copy % layout.ranks_of_a_copy == 0


def test_nothing_that_fits_is_quicker():
    """Every setting of a small search, its memory counted one by one."""
    cfg, shape = recipe("7b", "grpo.beta=0")
    work = workload(cfg, shape.vision)
    found = recommend(cfg, shape, H100, 4, work)
    best, count = float("inf"), 0
    for parallel, copies in search.layouts(cfg, shape.text, 4, 8):
        for budget in search.MICRO_BATCH_TOKENS:
            for recompute in search.recomputes(cfg, shape):
                for decoding in search.decodings(shape.text, parallel, 8):
                    setting = search.Setting(parallel, budget, recompute, decoding, search.lanes(cfg, copies))
                    tried = setting.of(cfg)
                    count += 1
                    try:
                        check(tried, shape, 4)
                    except ValueError:
                        continue
                    how = program(tried, 28, 4, 8)
                    seconds = step_time(H100, shape, how, work).seconds
                    if seconds < best and not misfit(rank_memory(tried, shape, 4), H100, 4):
                        best = seconds
    assert best <= found.choices[0].time.seconds <= best * (1 + ALIKE)
    assert found.settings <= count  # budgets that pack alike are one setting


def test_every_rule_has_its_reason():
    _, _, seven = recommended("7b", 16)
    assert seven.refused["tensor parallelism does not divide the heads"] > 0  # 28 heads by 8
    assert seven.refused["generation does not divide"] > 0
    _, _, many = recommended("3b", 64)
    assert many.refused["train.prompts_per_step=16 is not a multiple of the copies"] > 0
    _, _, cache = recommended("72b", 64, "rollout.max_cache_tokens=4000")
    assert cache.refused["generation has too small a cache"] > 0  # one lane of two stages has room for none
    cfg, shape, large = recommended("32b", 8)
    assert not large.choices and sum(large.refused.values()) == large.settings
    setting, need = large.nearest
    assert need > room(H100) and setting.parallel.ranks_of_a_copy <= 8
    assert recommend(cfg, shape, H100, 16, workload(cfg, shape.vision)).choices


def test_a_node_holds_its_ranks():
    cfg, shape = recipe("72b")
    small = H100.model_copy(update={"host_memory_bytes": hardware.Number(value=2e11, source="assumed")})
    problem = misfit(rank_memory(cfg, shape, 64), small, 8)
    assert problem.startswith("the ranks of a node need ") and problem.endswith("more than its 200 GB")
    found = recommend(cfg, shape, small, 64, workload(cfg, shape.vision))
    assert not found.choices and found.refused["does not fit the node's memory"] > 0


def test_what_the_program_refuses():
    cases = {
        "train.prompts_per_step=9": r"train.prompts_per_step=9 is not a multiple of the 2 data-parallel ranks",
        "data.lanes=3": r"data.lanes=3 is not a multiple of the 2",
        "parallel.tensor_model_parallel_size=24": "24 does not divide the model's 64 attention heads",
        "parallel.pipeline_layers=[10,10,10,10,10,10,10,11]": "adds up to 81 layers",
        "recompute.num_layers=2": "recompute.num_layers=2 does not divide the 11 layers",
        "rollout.max_cache_tokens=100": "rollout.max_cache_tokens=100 is too small",
    }
    for override, message in cases.items():
        cfg, shape = recipe("72b", override)
        with pytest.raises(ValueError, match=message.replace("[", r"\[")):
            check(cfg, shape, 96 if "tensor" in override else 64)
    cfg, shape = recipe("72b")
    with pytest.raises(ValueError, match="start a multiple of 32 ranks"):
        check(cfg, shape, 48)


def test_layers_that_do_not_divide():
    assert search.cut(80, 8) is None
    assert search.cut(80, 16) is None
    assert search.cut(28, 8) == [3, 3, 4, 4, 4, 4, 3, 3]
    for chunks in range(1, 65):
        layers = search.cut(64, chunks) or [64 // chunks] * chunks
        assert sum(layers) == 64 and max(layers) - min(layers) <= 1
        assert all(b >= a for a, b in pairwise(layers[: len(layers) // 2]))  # shorter at the ends


def test_planning_needs_no_torch():
    code = (
        "import sys, megatron_vlmr1.plan.document, megatron_vlmr1.plan.tables, megatron_vlmr1.plan.fit\n"
        "sys.exit(bool({'torch', 'megatron', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
