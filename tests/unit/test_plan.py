"""What a plan says of a step: work, parts that are known by hand, and how they move with the settings."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_vlmr1 import config
from megatron_vlmr1.cli.main import main
from megatron_vlmr1.models.segments import Segment
from megatron_vlmr1.plan.activations import Layer, Widths, chunk_kept, norm
from megatron_vlmr1.plan.lines import lines, step_work
from megatron_vlmr1.plan.load import Load, MicroBatch, buckets, in_flight, largest, largest_grid, windows
from megatron_vlmr1.plan.memory import RankMemory, rank_memory
from megatron_vlmr1.plan.shapes import PlanShape, read_plan_shape
from megatron_vlmr1.plan.tower import Tower

TINY = read_plan_shape("asset:tiny_vlm")


def settings(tp: int = 1, pp: int = 1, **sections: Any) -> config.Config:
    parallel = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, **sections.pop("parallel", {})}
    raw = {"model": {"path": "-"}, "data": {"train": "-"}, "precision": "fp32", "parallel": parallel, **sections}
    return config.parse(raw, "test")


def plan(cfg: config.Config, world: int = 1, shape: PlanShape = TINY) -> list[RankMemory]:
    return rank_memory(cfg, shape, world, "cpu")


def test_what_is_there_all_the_time() -> None:
    (one,) = plan(settings())
    buffer = one.phases["save"]["weights"] // 4
    assert one.parameters <= buffer < 1.01 * one.parameters  # alignment
    parts = {part: one.phases["save"][part] for part in ("weights", "gradients", "optimizer")}
    assert parts == {"weights": 4 * buffer, "gradients": 4 * buffer, "optimizer": 8 * buffer}
    assert one.host["reference"] == 4 * one.parameters
    halved = plan(settings(), 2)[0]
    assert halved.phases["save"]["optimizer"] == 4 * buffer and halved.phases["save"]["gradients"] == 4 * buffer
    (bf16,) = plan(settings(precision="bf16", grpo={"beta": 0.0}, model={"path": "-", "freeze_vision": True}))
    held = bf16.phases["save"]
    assert held["optimizer"] == 3 * held["gradients"] < 12 * bf16.parameters
    assert held["weights"] - held["gradients"] // 2 == 2 * (TINY_TOWER := _tower()) and TINY_TOWER > 0
    assert "reference" not in bf16.host


def test_a_node_holds_one_set_of_weights_to_save_and_one_reward_service() -> None:
    (one,) = plan(settings(tp=2), 2)
    published = plan(settings())[0].parameters * 4  # of the whole stage, uncut
    rewards = one.host["reward processes of the node"]
    # A last save begins when the staged one is given back.
    assert one.host_peak == sum(one.host.values()) - min(one.host["staged save"], one.host["last save"])
    staged = one.host["staged save"] - published  # of any rank
    assert staged == 12 * one.phases["save"]["weights"] // 4
    rest = one.host["process"] + one.host["reference"] + one.host["pixels"] + one.host.get("prompts ahead", 0)
    assert one.other_host == rest + max(staged, one.host["last save"])
    assert one.node_host(2) == one.host_peak + one.other_host
    assert one.node_host(8) == 4 * (one.host_peak - rewards + one.other_host) + rewards  # four stages of two ranks
    served = settings(tp=2, rewards={"address": "tcp://10.0.0.1:5555", "keys": "keys"})
    assert "reward processes of the node" not in plan(served, 2)[0].host
    none = plan(settings(train={"async_save": False}))[0]
    assert "staged save" not in none.host and none.host_peak == sum(none.host.values())


def _tower() -> int:
    from megatron_vlmr1.plan.counts import tower_tensors

    return sum(tower_tensors(TINY))


def test_a_cache_and_a_copy_for_generation() -> None:
    """Their numbers by hand: two heads of 32 in four layers, keys and values, of 4 bytes."""
    work = {"data": {"train": "-", "max_prompt_tokens": 100}, "train": {"prompts_per_step": 3}}
    rollout = {"num_generations": 4, "max_new_tokens": 20}
    (one,) = plan(settings(**work, rollout=rollout))
    a_token = 4 * 2 * 2 * 32 * 4
    assert one.phases["rollout"]["KV cache"] == (3 * 100 + 12 * 20) * a_token
    small = settings(**work, rollout={**rollout, "max_cache_tokens": 200})
    assert plan(small)[0].phases["rollout"]["KV cache"] == (100 + 4 * 20) * a_token
    with pytest.raises(ValueError, match="max_cache_tokens=100 is too small"):
        plan(settings(**work, rollout={**rollout, "max_cache_tokens": 100}))
    copied = plan(settings(pp=2, **work, rollout={**rollout, "tensor_model_parallel_size": 1}), 2)
    # Each of the two ranks generates two of the three prompts, on all four layers.
    assert [s.phases["rollout"]["decoding copy"] for s in copied] == [4 * one.parameters] * 2
    assert [s.phases["rollout"]["KV cache"] for s in copied] == [(2 * 100 + 8 * 20) * a_token] * 2
    assert all("decoding copy" not in s.phases[phase] for s in copied for phase in ("logprobs", "update", "save"))
    with pytest.raises(ValueError, match=r"rollout.tensor_model_parallel_size=2 x .*does not divide the 1 ranks"):
        settings(rollout={"tensor_model_parallel_size": 2})


def test_captured_ticks_have_memory_of_their_own() -> None:
    """By hand: 3 prompts of 100 tokens x 6 completions of 20, two key/value heads and four query heads, fp32."""
    work = {"data": {"train": "-", "max_prompt_tokens": 100}, "train": {"prompts_per_step": 3}}
    rollout = {"num_generations": 6, "max_new_tokens": 20}

    def held(device: Any, **more: Any) -> dict[str, int]:
        return rank_memory(settings(**work, rollout={**rollout, **more}), TINY, 1, device)[0].phases["rollout"]

    ticks = held("cuda", decode_burst=1)
    assert "decoding" not in ticks and ticks["prefill"] > 0  # the dearer moment
    assert held("cuda", cuda_graphs="none") == held("cuda", decode_burst=1, cuda_graphs="auto") == ticks
    attended = 18 * 4 * 120 * (2 + 1) * 4 + 18 * (256 + 4 * 256) * 4
    masks, padding = (18 * 20 + 3 * 100) * 2 * 4, (3 * 8 - 18) * 4 * 100 * 4  # groups of 6 in a grid 8 wide
    assert held("cuda") == {**ticks, "decoding": attended + masks + padding}
    assert held("cpu") == held("cpu", decode_burst=4) == held("cpu", cuda_graphs="none")  # less than prefill
    piped = settings(pp=2, **work, rollout=rollout)
    assert [s.phases["rollout"].get("decoding") for s in rank_memory(piped, TINY, 2)] == [None, None]


def test_micro_batches_are_cut_as_the_update_cuts_them() -> None:
    """Against `data.packing`, with prompts and completions of the same lengths."""
    import numpy as np

    from megatron_vlmr1.data.packing import PackedGroup, pack, split_by_tokens
    from megatron_vlmr1.types import Prompt

    load = Load(prompts=5, generations=4, prompt_tokens=30, new_tokens=11, grids=())
    ids = np.zeros(30, np.int64)
    prompts = [Prompt(i, str(i), ids, np.tile(np.arange(30), (3, 1)), (), "", "") for i in range(5)]
    groups = [PackedGroup(p, (np.zeros(11, np.int64),) * 4, (0, 1, 2, 3)) for p in prompts]
    for budget in (45, 60, 75, 100, 200, 1000):
        for pp in (1, 2, 4):
            cfg = settings(pp=pp, train={"micro_batch_tokens": budget})
            parts = [pack(part, 999, 1) for part in split_by_tokens(groups, budget, pp)]
            found = load.micro_batches(cfg)
            assert [b.tokens for b in found] == [len(part.token_ids) for part in parts]
            assert [b.labels for b in found] == [len(part.label_ids) for part in parts]


def test_buckets_are_those_of_attention() -> None:
    """Rows and masks against the plan that a layer really uses, text and windows of an odd image."""
    from megatron_vlmr1.models.attention import PaddedPlan
    from megatron_vlmr1.models.vision import _layout, _segments

    segments = [Segment(0, 9), *(Segment(9 + 5 * i, 14 + 5 * i, (0, 9)) for i in range(3)), Segment(24, 25)]
    made = PaddedPlan(segments, causal=True).buckets
    assert [(b.batch, b.mask is not None) for b in made] == [(b.batch, b.masked) for b in buckets(segments)]
    shapes = [tuple(b.mask.shape) for b in made if b.mask is not None]
    assert shapes == [(b.batch, 1, b.queries, b.keys) for b in buckets(segments) if b.masked] == [(3, 1, 5, 14)]
    copied = [(not isinstance(b.queries, slice), not isinstance(b.keys, slice)) for b in made]
    assert copied == [(b.copies_queries, b.copies_keys) for b in buckets(segments)]
    assert TINY.vision is not None  # windows of two units a side
    grids = [(1, 10, 14), (1, 8, 8), (1, 10, 14)]
    sizes = [n for grid in grids for n in _layout(grid, 2, 2).windows.tolist()]
    made = PaddedPlan(_segments(sizes), causal=False).buckets
    rows = [(b.batch, b.mask is not None) for b in made]
    assert sorted(rows) == sorted((b.batch, b.masked) for b in windows(TINY.vision, grids)) and len(rows) == 3


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_gpus_in_half_precision_pad_and_mask_nothing(dtype: str) -> None:
    """Groups of unequal pieces: on a GPU, queries, keys, one output and its log-sum-exps, whatever the pieces."""
    cfg = settings(precision=dtype, train={"micro_batch_tokens": 4096, "prompts_per_step": 4})
    item = 2 if dtype == "bf16" else 4
    load = largest(cfg, TINY, 1)
    padded, flat = (replace(load, flash=flash).micro_batches(cfg)[0] for flash in (False, True))
    assert len(padded.buckets) > 1 and any(b.masked for b in padded.buckets) and flat.tokens == padded.tokens
    layers = [Layer(Widths.of(TINY.text, config.ParallelConfig(), item), batch) for batch in (padded, flat)]
    query, key = 4 * 32, 2 * 32
    assert layers[1].core == flat.tokens * ((2 * query + key) * item + 4 * 4) < layers[0].core
    assert layers[1].around == flat.tokens * (query + 2 * key + 4 * 32) * item < layers[0].around
    assert layers[1].plan == 0 < layers[0].plan
    assert TINY.vision is not None
    tower, patches = Tower(TINY.vision, ((1, 10, 14), (1, 8, 8)), 1, item, flash=True), 204
    rest = 2 * norm(patches, 96, item) + patches * 4 * 192 * item
    # The fused row, in which the values lie, turned queries and keys, the output, and log-sum-exps of three heads.
    assert tower._block(False) == tower._block(True) == rest + patches * (6 * 96 * item + 3 * 4)
    cpu, gpu = (rank_memory(cfg, TINY, 1, kind)[0].phases["update"]["activations"] for kind in ("cpu", "cuda"))
    assert gpu < cpu if dtype == "bf16" else gpu == cpu


def test_micro_batches_in_flight() -> None:
    """1F1B: as many as there are stages behind; interleaved: megatron-core's count, chunks by turns."""
    for stage in range(4):
        assert max(sum(c.values()) for c in in_flight(stage, 4, 1, 8)) == 4 - stage
    assert max(sum(c.values()) for c in in_flight(0, 4, 1, 2)) == 2
    most = max(in_flight(0, 4, 2, 8), key=lambda c: sum(c.values()))
    assert sum(most.values()) == 2 * 3 + 4 + 1 and max(c[0] for c in in_flight(0, 4, 2, 8)) == 8
    assert all(c == Counter({0: 1}) for c in in_flight(0, 1, 1, 3))
    assert list(in_flight(1, 4, 2, 10**6)) == list(in_flight(1, 4, 2, 16))  # it all comes again


def test_thousands_of_groups_on_a_rank() -> None:
    cfg = settings(train={"micro_batch_tokens": 8192, "prompts_per_step": 20_000})
    batches = Load(20_000, 8, 1024, 257, ()).micro_batches(cfg)
    assert {batch.tokens for batch in batches} == {2 * (1024 + 8 * 256)} and len(batches) == 10_000


def test_settings_that_save_memory_do() -> None:
    def update(**sections: Any) -> int:
        return plan(settings(train={"micro_batch_tokens": 4096}, **sections))[0].peak("update")

    none = update()
    selective = update(recompute={"granularity": "selective"})
    mlp = update(recompute={"granularity": "selective", "modules": ["core_attn", "mlp"]})
    block = update(recompute={"granularity": "full", "method": "block", "num_layers": 2})
    full = update(recompute={"granularity": "full"})
    assert none > selective > mlp > full and none > block > full
    assert update(recompute={"granularity": "full", "tower": True}) <= full
    assert update(model={"path": "-", "freeze_vision": True}) < none
    split = plan(settings(tp=2, parallel={"sequence_parallel": True}, train={"micro_batch_tokens": 4096}), 2)
    whole = plan(settings(tp=2, train={"micro_batch_tokens": 4096}), 2)
    assert split[0].phases["update"]["activations"] < whole[0].phases["update"]["activations"]


# Bytes that autograd kept of one layer or block in bf16, measured on a CPU at the published widths (docs/decisions.md):
# kB of a token and layer, and of a token and layer with core_attn and mlp recomputed.
MEASURED = {"7b": (272, 83), "32b": (395, 120), "72b": (481, 187)}
BLOCK_KB = 61  # of a patch and tower block


@pytest.mark.parametrize("size", MEASURED)
def test_layers_keep_what_was_measured_at_published_widths(size: str) -> None:
    shape = read_plan_shape(f"qwen2.5-vl-{size}")
    batch = MicroBatch(2048, 0, buckets([Segment(0, 2048)]), ())
    layer = Layer(Widths.of(shape.text, config.ParallelConfig(), 2), batch)
    parts = config.RecomputeConfig(granularity="selective", modules=["core_attn", "mlp"])
    kept = [layer.kept(recompute) / 2048e3 for recompute in (config.RecomputeConfig(), parts)]
    assert kept == pytest.approx(MEASURED[size], rel=0.01)
    assert chunk_kept(layer, 1, config.RecomputeConfig(granularity="full"))[0] == 2048 * 2 * shape.text.hidden_size
    assert shape.vision is not None
    tower = Tower(shape.vision, ((1, 70, 72),), 1, 2)  # whose last windows are cut
    assert tower._block(full=False) / (70 * 72) / 1e3 == pytest.approx(BLOCK_KB, rel=0.01)


def test_the_largest_step() -> None:
    cfg = settings(data={"train": "-", "max_prompt_tokens": 2048, "max_pixels": 1003520})
    assert TINY.vision is not None and largest_grid(cfg, TINY.vision) == (1, 70, 72)  # 35 x 36 of 1280 tokens
    assert largest(cfg, TINY, 4).prompts == 4  # of 16
    small = settings(data={"train": "-", "max_prompt_tokens": 164})
    assert largest_grid(small, TINY.vision) == (1, 20, 20)  # 64 tokens are left to the text
    tokens, flops = step_work(settings(grpo={"beta": 0.0}), TINY)
    assert tokens == 16 * (2048 + 8 * 256)
    assert step_work(settings(grpo={"beta": 0.04}), TINY)[1] / flops == pytest.approx(5 / 4)
    refilling = settings(grpo={"beta": 0.0, "dynamic_sampling_rounds": 5})
    assert step_work(refilling, TINY)[1] / flops == pytest.approx(8 / 4)


def test_numbers_of_the_program_that_a_plan_knows_without_torch() -> None:
    from megatron_vlmr1.checkpoint.writer import MAX_SHARD_BYTES
    from megatron_vlmr1.models.logprobs import TILES
    from megatron_vlmr1.parallel import replicas
    from megatron_vlmr1.plan import generation, memory
    from megatron_vlmr1.rollout import sampling

    assert memory.TILES == TILES and memory.SHARD_BYTES == MAX_SHARD_BYTES
    assert memory.CHECKSUM_NUMBERS == {"cpu": replicas._CPU_CHUNK, "cuda": replicas._CUDA_CHUNK}
    assert generation.SMALL_VOCABULARY == sampling._SMALL


LLAMA = {
    **dict(architectures=["LlamaForCausalLM"], hidden_size=4096, num_hidden_layers=32, num_attention_heads=32),
    **dict(num_key_value_heads=8, intermediate_size=14336, vocab_size=128256, max_position_embeddings=8192),
}
QWEN3 = {
    **dict(architectures=["Qwen3ForCausalLM"], hidden_size=2048, num_hidden_layers=28, num_attention_heads=16),
    **dict(num_key_value_heads=8, intermediate_size=6144, vocab_size=151936, head_dim=128, tie_word_embeddings=True),
}
QWEN2 = {
    **dict(architectures=["Qwen2ForCausalLM"], hidden_size=896, num_hidden_layers=24, num_attention_heads=14),
    **dict(num_key_value_heads=2, intermediate_size=4864, vocab_size=151936, tie_word_embeddings=True),
}


@pytest.mark.parametrize("raw", [LLAMA, QWEN3, QWEN2], ids=["llama", "qwen3", "qwen2"])
def test_text_models_hold_what_transformers_counts(tmp_path: Path, raw: dict[str, Any]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = raw["architectures"][0].removesuffix("ForCausalLM").lower()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, **raw}))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(tmp_path)))
    shape = read_plan_shape(tmp_path / "config.json")
    (one,) = plan(settings(), 1, shape)
    assert one.parameters == sum(p.numel() for p in model.parameters())
    assert "vision tower" not in one.phases["update"] and shape.vision is None and shape.vlm is None


def test_refusals_and_the_dry_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="3 ranks cannot hold"):
        list(lines(settings(tp=2), TINY, 3))
    with pytest.raises(ValueError, match="tensor_model_parallel_size=3 does not divide the model's 4 attention heads"):
        plan(settings(tp=3), 3)
    path = tmp_path / "config.json"
    for raw, why in (
        ({"architectures": ["MixtralForCausalLM"]}, "architecture 'MixtralForCausalLM' cannot be planned"),
        ({**LLAMA, "attention_bias": True}, "attention_bias=true"),
        ({**LLAMA, "num_hidden_layers": 0}, "num_layers: 0 is not a positive"),
        ({**LLAMA, "hidden_size": "wide"}, "missing or malformed"),
        ({**LLAMA, "num_key_value_heads": 3}, "3 key/value heads do not divide"),
        ({**LLAMA, "architectures": [["LlamaForCausalLM"]]}, "cannot be planned"),
        ({**LLAMA, "architectures": 5}, "architecture 5 cannot be planned"),
        ({**LLAMA, "architectures": []}, r"architecture \[\] cannot be planned"),
        ([], "not an object"),
    ):
        path.write_text(json.dumps(raw))
        with pytest.raises(ValueError, match=why):
            read_plan_shape(path)
    with pytest.raises(ValueError, match=r"nowhere: no such directory.* qwen2.5-vl-72b"):
        read_plan_shape("nowhere")
    assert main(["train", "configs/quickstart.yaml", "--dry-run", "--nproc", "4"]) == 0
    out = capfd.readouterr().out
    assert "# 4 ranks: tensor 2 x pipeline 1 x data 2\n" in out and "# a rank of stage 0: " in out
    assert "of a CPU, in the " in out and "(weights " in out and "; host memory: process 350.0 MB, reference " in out
    virtual = {"virtual_pipeline_model_parallel_size": 2}
    first = next(lines(settings(pp=2, parallel=virtual), TINY, 4))
    assert first == "4 ranks: tensor 1 x pipeline 2 (in 2 virtual stages) x data 2"
