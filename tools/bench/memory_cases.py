"""Models, layouts and steps in which the planner's memory is held against what is measured."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vlmr1 import config
from megatron_vlmr1.checkpoint.locate import hf_directory
from megatron_vlmr1.plan.load import Load
from megatron_vlmr1.plan.memory import RankMemory, rank_memory
from megatron_vlmr1.plan.shapes import read_plan_shape

LIMIT_S = 500
TINY: dict[str, Any] = {"path": "asset:tiny_vlm"}
HUNDRED_MILLION: dict[str, Any] = {
    "text": {
        **dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=4),
        **dict(intermediate_size=2048, vocab_size=8192),
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
    },
    "vision": {
        **dict(depth=8, hidden_size=320, num_heads=4, intermediate_size=864, window_size=112),
        "fullatt_block_indexes": [3, 7],
    },
    "tied": False,
}
VOCABULARY: dict[str, Any] = {  # small but for its many tokens
    "text": {
        **dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2),
        **dict(intermediate_size=256, vocab_size=40_000),
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
    },
    "vision": {
        **dict(depth=2, hidden_size=64, num_heads=4, intermediate_size=128, window_size=56),
        "fullatt_block_indexes": [1],
    },
    "tied": True,
}


@dataclass(frozen=True)
class Case:
    """One model in one layout, and the step that is run."""

    model: dict[str, Any]
    world: int
    sections: dict[str, Any]
    load: dict[str, Any]  # of a copy of the model


def load(prompts: int, generations: int, prompt: int, new: int, grid: tuple[int, int] | None = None) -> dict[str, Any]:
    """Return a case's load."""
    grids = [[1, *grid]] if grid else []
    return {
        **dict(prompts=prompts, generations=generations, prompt_tokens=prompt, new_tokens=new),
        "grids": grids,
    }


def layout(tp: int = 1, pp: int = 1, vp: int = 1, sp: bool = False) -> dict[str, Any]:
    """Return the section `parallel`."""
    return {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": vp,
        "sequence_parallel": sp,
        "timeout_s": LIMIT_S,
    }


SHORT, LONG = load(4, 4, 128, 32, (12, 12)), load(2, 4, 640, 128, (40, 44))
MICRO, SINGLE = {"micro_batch_tokens": 600}, {"micro_batch_tokens": 300}  # two groups each, and one
CASES = {
    "tiny_one": Case(TINY, 1, {"train": MICRO}, SHORT),
    "tiny_tp2": Case(TINY, 2, {"parallel": layout(tp=2), "train": MICRO}, SHORT),
    "tiny_tp2_sp": Case(TINY, 2, {"parallel": layout(tp=2, sp=True), "train": MICRO}, SHORT),
    "tiny_pp2": Case(TINY, 2, {"parallel": layout(pp=2), "train": MICRO}, SHORT),
    "tiny_pp2_vp2": Case(TINY, 2, {"parallel": layout(pp=2, vp=2), "train": SINGLE}, SHORT),
    "tiny_pp4": Case(TINY, 4, {"parallel": layout(pp=4), "train": SINGLE}, SHORT),
    "tiny_dp2": Case(TINY, 2, {"train": MICRO}, SHORT),
    "tiny_tp2_pp2": Case(TINY, 4, {"parallel": layout(tp=2, pp=2), "train": SINGLE}, SHORT),
    "tiny_copy": Case(
        TINY, 2, {"parallel": layout(pp=2), "rollout": {"tensor_model_parallel_size": 1}, "train": MICRO}, SHORT
    ),
    "tiny_long": Case(TINY, 1, {"train": {"micro_batch_tokens": 1300}}, LONG),
    "tiny_long_full": Case(
        TINY, 1, {"recompute": {"granularity": "full", "tower": True}, "train": {"micro_batch_tokens": 1300}}, LONG
    ),
    "tiny_long_selective": Case(
        TINY, 1, {"recompute": {"granularity": "selective"}, "train": {"micro_batch_tokens": 1300}}, LONG
    ),
    "tiny_bf16": Case(TINY, 1, {"precision": "bf16", "train": MICRO}, SHORT),
    "tiny_offload": Case(TINY, 1, {"optimizer": {"offload": "rollout"}, "train": MICRO}, SHORT),
    "tiny_always": Case(
        TINY,
        2,
        {
            "precision": "bf16",
            "optimizer": {"offload": "always"},
            "parallel": {**layout(), "overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 200_000},
            "train": MICRO,
        },
        SHORT,
    ),
    "tiny_frozen": Case(TINY, 1, {"model": {"path": "-", "freeze_vision": True}, "train": MICRO}, SHORT),
    "tiny_beta0": Case(TINY, 1, {"grpo": {"beta": 0.0}, "train": MICRO}, SHORT),
    "tiny_tp4": Case(TINY, 4, {"parallel": layout(tp=4), "train": MICRO}, SHORT),
    "tiny_block": Case(
        TINY,
        1,
        {"recompute": {"granularity": "full", "method": "block", "num_layers": 2}, "train": MICRO},
        SHORT,
    ),
    "tiny_mlp": Case(
        TINY,
        1,
        {"recompute": {"granularity": "selective", "modules": ["core_attn", "mlp"]}, "train": MICRO},
        SHORT,
    ),
    "vocabulary_one": Case(VOCABULARY, 1, {"train": MICRO}, SHORT),
    "vocabulary_untied_bf16": Case({**VOCABULARY, "tied": False}, 1, {"precision": "bf16", "train": MICRO}, SHORT),
    "vocabulary_top_p": Case(VOCABULARY, 1, {"rollout": {"top_p": 0.9}, "train": MICRO}, SHORT),
    "vocabulary_tp2_top_k": Case(
        VOCABULARY, 2, {"parallel": layout(tp=2), "rollout": {"top_k": 50, "temperature": 0.7}, "train": MICRO}, SHORT
    ),
    "vocabulary_tp2": Case(VOCABULARY, 2, {"parallel": layout(tp=2), "train": MICRO}, SHORT),
    "vocabulary_pp2": Case(VOCABULARY, 2, {"parallel": layout(pp=2), "train": MICRO}, SHORT),
    "100m_one": Case(HUNDRED_MILLION, 1, {"train": MICRO}, SHORT),
    "100m_tp2": Case(HUNDRED_MILLION, 2, {"parallel": layout(tp=2), "train": MICRO}, SHORT),
    "100m_pp2": Case(HUNDRED_MILLION, 2, {"parallel": layout(pp=2), "train": MICRO}, SHORT),
    "100m_dp2": Case(HUNDRED_MILLION, 2, {"train": MICRO}, SHORT),
    "100m_tp2_pp2": Case(HUNDRED_MILLION, 4, {"parallel": layout(tp=2, pp=2), "train": MICRO}, SHORT),
    "100m_long": Case(HUNDRED_MILLION, 1, {"train": {"micro_batch_tokens": 1300}}, LONG),
    "100m_tied_pp2_full": Case(
        {**HUNDRED_MILLION, "tied": True},
        2,
        {"recompute": {"granularity": "full"}, "parallel": layout(pp=2), "train": SINGLE},
        SHORT,
    ),
    "100m_bf16_full": Case(
        HUNDRED_MILLION,
        2,
        {
            **{"precision": "bf16", "recompute": {"granularity": "full"}, "parallel": layout(tp=2, sp=True)},
            "train": SINGLE,
        },
        SHORT,
    ),
}


def settings(case: Case, folder: Path) -> config.Config:
    """Return the config of a case; its run directory is in `folder`."""
    work = case.load
    rollout = {"num_generations": work["generations"], "max_new_tokens": work["new_tokens"]}
    raw: dict[str, Any] = {
        **{
            "precision": "fp32",
            "model": {"path": "-"},
            "data": {"train": "-", "max_prompt_tokens": work["prompt_tokens"]},
        },
        **case.sections,
        "run_dir": str(folder / "run"),
        "rollout": {**rollout, **case.sections.get("rollout", {})},
    }
    copies = case.world // config.parse(raw, "case").parallel.ranks_of_a_copy
    raw["train"] = {**raw.get("train", {}), "prompts_per_step": work["prompts"] * copies}
    return config.parse(raw, "case")


def write_model(case: Case, folder: Path) -> Path:
    """Return the directory of a case's config.json."""
    if "path" in case.model:
        return hf_directory(case.model["path"])
    text, vision = case.model["text"], case.model["vision"]
    raw = {
        **dict(model_type="qwen2_5_vl", architectures=["Qwen2_5_VLForConditionalGeneration"]),
        **dict(image_token_id=5, video_token_id=6, vision_start_token_id=7, vision_end_token_id=8),
        "tie_word_embeddings": case.model["tied"],
        "text_config": {"max_position_embeddings": 8192, "rms_norm_eps": 1e-6, **text},
        "vision_config": {
            **dict(patch_size=14, spatial_merge_size=2, temporal_patch_size=2, in_channels=3),
            **{"out_hidden_size": text["hidden_size"], **vision},
        },
    }
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "config.json").write_text(json.dumps(raw))
    return folder / "model"


def step_load(case: Case) -> Load:
    """Return what a copy of the model does in a step."""
    return Load(**{**case.load, "grids": tuple(tuple(grid) for grid in case.load["grids"])})


def predicted(case: Case, folder: Path) -> list[RankMemory]:
    """Return what the planner says of a case, a stage each."""
    shape = read_plan_shape(write_model(case, folder))
    return rank_memory(settings(case, folder), shape, case.world, "cpu", step_load(case))
