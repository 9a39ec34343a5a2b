"""The plan counts what the model really has."""

from __future__ import annotations

import pytest

from megatron_vlmr1 import config
from megatron_vlmr1.checkpoint.locate import hf_directory
from megatron_vlmr1.cli.main import main
from megatron_vlmr1.models.families import read_shape
from megatron_vlmr1.plan.step import StepPlan, lines, plan


def settings(tp: int = 1, pp: int = 1, **sections: object) -> config.Config:
    parallel = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    raw = {"model": {"path": "-"}, "data": {"train": "-"}, "precision": "fp32", "parallel": parallel, **sections}
    return config.parse(raw, "test")


def test_one_rank_holds_what_transformers_counts() -> None:
    from transformers import AutoModelForImageTextToText

    directory = hf_directory("asset:tiny_vlm")
    model = AutoModelForImageTextToText.from_pretrained(directory)
    (only,) = plan(settings(), read_shape(directory), 1)
    count = sum(p.numel() for p in model.parameters())
    assert only.parameters == count
    assert (only.weights_bytes, only.gradients_bytes, only.optimizer_bytes) == (4 * count, 4 * count, 8 * count)
    assert only.reference_bytes == 4 * count
    # 4 layers x (key and value) x 2 heads of 32 numbers of 4 bytes
    assert only.kv_cache_bytes == 262_144 * 4 * 2 * 2 * 32 * 4


def test_layouts_share_out() -> None:
    shape = read_shape(hf_directory("asset:tiny_vlm"))
    (one,) = plan(settings(), shape, 1)
    (half,) = plan(settings(tp=2), shape, 4)
    vision = one.parameters - plan(settings(pp=2), shape, 2)[0].parameters  # less than all: some layers are elsewhere
    assert one.parameters / 2 < half.parameters < one.parameters and vision > 0
    assert half.optimizer_bytes == 8 * half.parameters // 2  # two data-parallel ranks share it
    first, last = plan(settings(pp=2), shape, 2)
    tied_copy = shape.text.vocab_size * shape.text.hidden_size
    assert first.parameters + last.parameters == one.parameters + tied_copy
    bf16 = plan(settings(precision="bf16", grpo={"beta": 0.0}, model={"path": "-", "freeze_vision": True}), shape, 1)[0]
    assert bf16.weights_bytes == 2 * bf16.parameters and bf16.reference_bytes == 0
    assert bf16.optimizer_bytes == 3 * bf16.gradients_bytes < 12 * bf16.parameters


def test_uneven_and_virtual_stages() -> None:
    """Where each layer lies is worked out by hand for four layers on two stages."""
    shape = read_shape(hf_directory("asset:tiny_vlm"))

    def stages(**parallel: object) -> list[StepPlan]:
        layout = {"pipeline_model_parallel_size": 2, **parallel}
        return plan(settings(pp=2).model_copy(update={"parallel": config.ParallelConfig(**layout)}), shape, 2)

    even, uneven = stages(), stages(pipeline_layers=[1, 3])
    virtual = stages(virtual_pipeline_model_parallel_size=2)
    t = shape.text
    qkv = (t.num_heads + 2 * t.num_kv_heads) * t.head_dim
    layer = 2 * t.hidden_size + (t.hidden_size + 1) * qkv + t.hidden_size * t.num_heads * t.head_dim
    layer += 3 * t.hidden_size * t.ffn_hidden_size
    assert [s.parameters for s in uneven] == [even[0].parameters - layer, even[1].parameters + layer]
    assert [s.kv_cache_bytes for s in uneven] == [even[0].kv_cache_bytes // 2, even[0].kv_cache_bytes // 2 * 3]
    assert [s.parameters for s in virtual] == [s.parameters for s in even]
    shifted = stages(virtual_pipeline_model_parallel_size=2, pipeline_layers=[1, 1, 1, 1])
    assert shifted == virtual
    cfg = config.parse(
        {
            "model": {"path": "-"},
            "data": {"train": "-"},
            "parallel": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
        },
        "test",
    )
    assert next(lines(cfg, shape, 4)) == "4 ranks: tensor 1 x pipeline 2 (in 2 virtual stages) x data 2"


def test_work_grows_with_passes() -> None:
    shape = read_shape(hf_directory("asset:tiny_vlm"))
    plain = plan(settings(grpo={"beta": 0.0}), shape, 1)[0]
    with_reference = plan(settings(grpo={"beta": 0.04}), shape, 1)[0]
    assert with_reference.step_flops / plain.step_flops == pytest.approx(5 / 4)
    refilling = plan(settings(grpo={"beta": 0.0, "dynamic_sampling_rounds": 5}), shape, 1)[0]
    assert refilling.step_flops / plain.step_flops == pytest.approx(8 / 4)
    assert plain.step_tokens == 16 * (2048 + 8 * 256)


def test_refusals_and_the_dry_run(capfd: pytest.CaptureFixture[str]) -> None:
    shape = read_shape(hf_directory("asset:tiny_vlm"))
    with pytest.raises(ValueError, match="3 ranks are not a multiple of tensor x pipeline = 2"):
        list(lines(settings(tp=2), shape, 3))
    assert main(["train", "configs/quickstart.yaml", "--dry-run", "--nproc", "4"]) == 0
    out = capfd.readouterr().out
    assert "# 4 ranks: tensor 2 x pipeline 1 x data 2\n" in out and "# a rank of stage 0: " in out


def test_a_copy_for_generation() -> None:
    """Its weights are those of its own layout, and so is the cache."""
    shape = read_shape(hf_directory("asset:tiny_vlm"))
    (whole,) = plan(settings(), shape, 1)
    copies = plan(settings(pp=2, rollout={"tensor_model_parallel_size": 1}), shape, 2)
    assert [s.copy_bytes for s in copies] == [4 * whole.parameters] * 2
    assert [s.kv_cache_bytes for s in copies] == [whole.kv_cache_bytes] * 2
    halves = plan(settings(pp=2, rollout={"tensor_model_parallel_size": 2}), shape, 2)
    (half,) = plan(settings(tp=2), shape, 2)
    assert [s.copy_bytes for s in halves] == [4 * half.parameters] * 2
    assert [s.kv_cache_bytes for s in halves] == [half.kv_cache_bytes] * 2 == [whole.kv_cache_bytes // 2] * 2
    assert whole.copy_bytes == 0 and "copy for generation" not in "".join(lines(settings(), shape, 1))
    assert f"copy for generation up to {4 * whole.parameters / 1e6:,.1f} MB" in "".join(
        lines(settings(pp=2, rollout={"tensor_model_parallel_size": 1}), shape, 2)
    )
    with pytest.raises(ValueError, match=r"rollout.tensor_model_parallel_size=2 x .*does not divide the 1 ranks"):
        settings(rollout={"tensor_model_parallel_size": 2})
