"""FP8 as a setting: how it is written, what is refused and why, and what megatron-core is told."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.fp8_utils import get_fp8_align_size
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlmr1 import config
from megatron_vlmr1.cli.main import main
from megatron_vlmr1.config import ParallelConfig, PrecisionConfig, RecomputeConfig
from megatron_vlmr1.config.rules import FP8_BLOCK, FP8_MULTIPLE, token_multiple
from megatron_vlmr1.data.packing import PackedGroup, pack
from megatron_vlmr1.models import fp8, layers
from megatron_vlmr1.models.families import read_shape
from megatron_vlmr1.parallel import mesh as meshes
from megatron_vlmr1.plan.hardware import read as read_hardware
from megatron_vlmr1.plan.load import Load
from megatron_vlmr1.plan.memory import rank_memory
from megatron_vlmr1.plan.shapes import read_plan_shape
from megatron_vlmr1.runtime import device
from megatron_vlmr1.telemetry.flops import peak_flops
from tests import jobs, recipes
from tests.checkpoints import random_prompt, write_random_checkpoint

RECIPES = ("delayed", "tensorwise", "blockwise")
# Of each published model: the tensor-parallel sizes that it can be cut into, and what a rank's weights are in FP8.
# full: multiples of 128; ragged: multiples of 16, whose last block of 128 is not full; no: not multiples of 16.
TABLE = {
    "3b": {1: "full", 2: "full", 4: "ragged", 8: "ragged", 16: "ragged"},
    "7b": {1: "full", 2: "full", 4: "full"},
    "32b": {1: "full", 2: "full", 4: "full", 8: "full"},
    "72b": {1: "full", 2: "ragged", 4: "ragged", 8: "ragged", 16: "no", 32: "no", 64: "no"},
}


def settings(precision: object = "bf16", **sections: object) -> config.Config:
    raw = {"model": {"path": "-"}, "data": {"train": "-"}, "precision": precision, **sections}
    return config.parse(raw, "test")


@pytest.mark.parametrize(
    ("in_file", "overrides", "dtype", "recipe"),
    [
        ("bf16", [], "bf16", "none"),
        ("fp32", [], "fp32", "none"),
        ("bf16", ["precision=fp32"], "fp32", "none"),
        ("bf16", ["precision.fp8=blockwise"], "bf16", "blockwise"),
        ("fp32", ["precision=bf16", "precision.fp8=delayed"], "bf16", "delayed"),
        ("fp32", ["precision.fp8=delayed", "precision=bf16"], "bf16", "delayed"),
        ("{dtype: bf16, fp8: tensorwise}", ["precision=bf16"], "bf16", "tensorwise"),
        ("{dtype: bf16, fp8: tensorwise}", ["precision.fp8=none", "precision=fp32"], "fp32", "none"),
        ("fp32", ["precision={dtype: bf16, fp8: delayed}"], "bf16", "delayed"),
    ],
)
def test_a_word_is_the_dtype(tmp_path, in_file, overrides, dtype, recipe):
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {{path: m}}\ndata: {{train: d}}\nprecision: {in_file}\n")
    cfg = config.load(path, overrides)
    assert (cfg.precision.dtype, cfg.precision.fp8) == (dtype, recipe)
    saved = tmp_path / "saved.yaml"
    saved.write_text(config.dump(cfg))
    assert config.load(saved) == cfg


@pytest.mark.parametrize(
    ("precision", "says"),
    [
        ({"fp8": "blockwise", "dtype": "fp32"}, "precision: fp8=blockwise needs dtype=bf16"),
        ({"fp8": "delayed", "num_layers_at_end_in_bf16": 1}, "precision: fp8=delayed does not take num_layers_at_end"),
        ({"fp8": "tensorwise", "amax_history_len": 4}, "fp8=tensorwise does not take amax_history_len"),
        ({"num_layers_at_start_in_bf16": 1}, "num_layers_at_start_in_bf16 is about FP8, but fp8=none"),
        ({"amax_compute_algo": "max"}, "amax_compute_algo is about FP8, but fp8=none"),
        ({"fp8": "mxfp8"}, "precision.fp8: Input should be 'none', 'delayed', 'tensorwise' or 'blockwise'"),
        ("fp16", "precision.dtype: Input should be 'fp32' or 'bf16'"),
        ({"fp9": "x"}, "unknown key precision.fp9; did you mean precision.fp8?"),
    ],
)
def test_what_does_not_go_together(precision, says):
    with pytest.raises(ValueError, match="^test: ") as refused:
        settings(precision)
    assert says in str(refused.value)


def test_torch_layers_compute_no_fp8():
    with pytest.raises(ValueError, match="precision.fp8=delayed needs model.spec=te or auto: torch computes no FP8"):
        settings({"fp8": "delayed"}, model={"path": "-", "spec": "torch"})


def megatron_config(precision: PrecisionConfig) -> TransformerConfig:
    device.prepare_megatron()
    shape = read_shape(recipes.published("7b"))
    with meshes.pretending():
        mesh = meshes.pretended(recipes.layout(4, 2), 0, 0)
        return layers.transformer_config(shape.text, mesh, torch.bfloat16, RecomputeConfig(), precision)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, {"fp8": None, "first_last_layers_bf16": False}),
        (
            {"fp8": "delayed"},
            {"fp8": "hybrid", "fp8_recipe": "delayed", "fp8_amax_history_len": 1, "tp_only_amax_red": True},
        ),
        (
            {"fp8": "delayed", "amax_history_len": 1024, "amax_compute_algo": "max"},
            {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max", "first_last_layers_bf16": False},
        ),
        ({"fp8": "tensorwise"}, {"fp8": "hybrid", "fp8_recipe": "tensorwise", "tp_only_amax_red": False}),
        (
            {"fp8": "blockwise", "num_layers_at_start_in_bf16": 2},
            {
                "fp8": "e4m3",
                "fp8_recipe": "blockwise",
                "first_last_layers_bf16": True,
                "num_layers_at_start_in_bf16": 2,
                "num_layers_at_end_in_bf16": 0,
            },
        ),
    ],
)
def test_what_megatron_core_is_told(given, told):
    """Of the version that is installed; the parameters stay in bf16, and so does attention."""
    made = megatron_config(PrecisionConfig(**given))
    assert {name: getattr(made, name) for name in told} == told
    assert not made.fp8_param and not made.fp8_dot_product_attention and not made.fp8_multi_head_attention


def test_a_megatron_core_without_an_option(monkeypatch):
    """Every option is among the fields of the installed version; another one that lacks some is refused."""
    every = PrecisionConfig(fp8="delayed").megatron_core()
    every |= PrecisionConfig(fp8="blockwise", num_layers_at_end_in_bf16=1).megatron_core()
    known = [field for field in dataclasses.fields(TransformerConfig)]
    assert every.keys() <= {field.name for field in known}
    monkeypatch.setattr(dataclasses, "fields", lambda kind: [f for f in known if f.name != "tp_only_amax_red"])
    with pytest.raises(ValueError, match="precision.fp8=delayed: this megatron-core has no tp_only_amax_red"):
        layers._fp8(PrecisionConfig(fp8="delayed"))


def test_megatron_core_refuses_what_we_refuse():
    """First and last layers in bf16 with delayed scaling, and more of them than a stage has."""
    plain = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "fp8": "hybrid", "first_last_layers_bf16": 1}
    with pytest.raises(ValueError, match="Delayed scaling does not support first / last layer in BF16"):
        TransformerConfig(**plain, fp8_recipe="delayed")
    with pytest.raises(ValueError, match="must be between 0 and number of layers per pipeline stage"):
        TransformerConfig(**plain, fp8_recipe="blockwise", num_layers_at_end_in_bf16=5)
    text = read_shape(recipes.published("7b")).text  # 28 layers
    cfg = settings({"fp8": "blockwise", "num_layers_at_end_in_bf16": 8}, parallel={"pipeline_model_parallel_size": 4})
    with pytest.raises(ValueError, match="num_layers_at_end_in_bf16=8 is more than megatron-core takes: at most the 7"):
        fp8.check(cfg, text)


def ragged(text, tp: int) -> list[str]:
    """Weights of a rank whose last blocks of `blockwise` are not full; they are multiplied all the same."""
    return [name for name, sides in fp8.matrices(text, tp).items() if any(side % FP8_BLOCK for side in sides)]


@pytest.mark.parametrize("size", recipes.SIZES)
def test_every_legal_tensor_parallel_size(size):
    text = read_shape(recipes.published(size)).text
    found = {
        tp: "no" if fp8.misfit(text, tp) else "ragged" if ragged(text, tp) else "full" for tp in fp8.tensor_sizes(text)
    }
    assert found == TABLE[size]


def test_weights_of_a_rank_by_hand():
    """72B at TP8: (64 + 2 x 8) x 128 / 8 rows of queries, keys and values, 29,568 / 8 feed-forward units."""
    text = read_shape(recipes.published("72b")).text
    assert fp8.matrices(text, 8) == {
        "self_attention.linear_qkv": (1280, 8192),
        "self_attention.linear_proj": (8192, 1024),
        "mlp.linear_fc1": (7392, 8192),
        "mlp.linear_fc2": (8192, 3696),
    }
    assert ragged(text, 8) == ["mlp.linear_fc1", "mlp.linear_fc2"]


def test_a_layout_that_fp8_does_not_take_names_those_that_it_does():
    cfg = settings({"fp8": "tensorwise"}, parallel={"tensor_model_parallel_size": 16})
    with pytest.raises(ValueError) as refused:
        fp8.check(cfg, read_shape(recipes.published("72b")).text)
    assert str(refused.value) == (
        "precision.fp8=tensorwise at parallel.tensor_model_parallel_size=16: mlp.linear_fc2.weight is 8192 x 1848 on a "
        "rank, but products in FP8 take sides that are multiples of 16; tensor-parallel sizes that fit: 1, 2, 4, 8"
    )
    with pytest.raises(ValueError, match="multiples of 16"):
        rank_memory(cfg, read_plan_shape("qwen2.5-vl-72b"), 16, "cuda")


def test_tokens_of_a_micro_batch():
    """16 for each share of the tensor-parallel group, as megatron-core aligns the recipes; whole blocks in blocks."""
    assert {get_fp8_align_size(recipe) for recipe in RECIPES} == {FP8_MULTIPLE}
    sharing = ParallelConfig(tensor_model_parallel_size=8, sequence_parallel=True)
    whole = ParallelConfig(tensor_model_parallel_size=8)
    for recipe, layout, multiple in [
        ("none", whole, 1),
        ("none", sharing, 8),
        ("tensorwise", whole, 16),
        ("delayed", sharing, 128),
        ("blockwise", whole, 128),
        ("blockwise", sharing, 1024),
    ]:
        assert token_multiple(PrecisionConfig(fp8=recipe), layout) == multiple
    cfg = settings(
        {"fp8": "delayed"},
        parallel={"tensor_model_parallel_size": 8, "sequence_parallel": True},
        train={"micro_batch_tokens": 127},
    )
    with pytest.raises(ValueError, match="train.micro_batch_tokens=127 is too small: .* multiples of 128 tokens"):
        fp8.check(cfg, read_shape(recipes.published("72b")).text)


def test_what_ranks_gather_is_whole_blocks():
    """Transformer Engine's quantiser in blocks gathers parts of 128 x 128 only (its `is_quantizable`)."""
    text = replace(read_shape(recipes.published("3b")).text, hidden_size=2048 + 16)
    sharing = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    fp8.check(settings({"fp8": "blockwise"}, parallel={"tensor_model_parallel_size": 2}), text)
    fp8.check(settings({"fp8": "tensorwise"}, parallel=sharing), text)
    with pytest.raises(ValueError, match="hidden size 2064, which ranks gather in FP8, is not a multiple of 128: use"):
        fp8.check(settings({"fp8": "blockwise"}, parallel=sharing), text)
    for size in TABLE:
        fp8.check(settings({"fp8": "blockwise"}, parallel=sharing), read_shape(recipes.published(size)).text)


def test_packs_are_padded_as_the_plan_counts_them(tmp_path):
    directory = write_random_checkpoint(tmp_path / "model", num_hidden_layers=1)
    prompt = random_prompt(directory, 0, 30)
    group = PackedGroup(prompt, (np.arange(5), np.arange(9)), (0, 1))
    cfg = settings({"fp8": "blockwise"}, parallel={"tensor_model_parallel_size": 2, "sequence_parallel": True})
    multiple = token_multiple(cfg.precision, cfg.parallel)
    batch = pack([group], 1 << 20, multiple)
    assert multiple == 256 and len(batch.token_ids) == -(-group.tokens // 256) * 256
    (planned,) = {b.tokens for b in Load(1, 2, len(prompt.token_ids), 7, ()).micro_batches(cfg)}
    assert planned == -(-(len(prompt.token_ids) + 2 * 6) // 256) * 256


def test_peaks_of_the_data_sheets():
    hopper = read_hardware(recipes.ROOT / "configs" / "hardware" / "h100-80gb.yaml")
    for precision, peak in (("bf16", 989e12), ("fp8", 1978e12)):
        assert peak_flops("NVIDIA H100 80GB HBM3", precision) == peak
        assert hopper.peak(precision) == pytest.approx(peak, rel=1e-3)
    assert peak_flops("NVIDIA H100 80GB HBM3", "fp32") is None and peak_flops(None, "fp8") is None


@pytest.mark.parametrize(
    ("overrides", "asked"),
    [
        (["precision=bf16", "precision.fp8=blockwise"], "precision.fp8=blockwise"),
        (["model.spec=te"], "model.spec=te"),
    ],
)
def test_training_without_transformer_engine(tmp_path: Path, capfd: pytest.CaptureFixture[str], overrides, asked):
    """Exit code 2 and one line that says what to install; nothing is written. A dry run needs nothing installed."""
    path = jobs.write_config(tmp_path, jobs.build_shards(tmp_path, "train", 8))
    words = ["train", str(path), *overrides]
    assert main(words) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert line.startswith(f"vlmr1: error: {asked} needs Transformer Engine, which is not installed: ")
    assert line.endswith("pip install --no-build-isolation 'megatron-vlmr1[cuda]'")
    assert not (tmp_path / "run").exists()
    assert main([*words, "--dry-run"]) == 0


def test_memory_of_weights_in_fp8():
    """By hand: 7B at TP4, two bytes for each weight that 28 layers multiply; all else is that of bf16, but padding."""
    shape = read_plan_shape("qwen2.5-vl-7b")
    parallel = {"tensor_model_parallel_size": 4}
    (plain,), (scaled,) = (
        rank_memory(settings(precision, parallel=parallel), shape, 4, "cuda")
        for precision in ("bf16", {"fp8": "blockwise"})
    )
    weights = 1152 * 3584 + 3584 * 896 + 2 * 4736 * 3584 + 3584 * 4736
    assert scaled.phases["save"]["fp8 weights"] == 2 * 28 * weights
    assert "fp8 weights" not in plain.phases["save"]
    assert plain.phases["save"]["weights"] == scaled.phases["save"]["weights"]
