"""Predicted times against sums by hand, the program's own packing and counting, and a cache that is played through."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_vlmr1 import config
from megatron_vlmr1.config import ParallelConfig, RecomputeConfig
from megatron_vlmr1.models.families import read_shape
from megatron_vlmr1.plan import hardware, layers, passes, rollout_time
from megatron_vlmr1.plan.costs import Device
from megatron_vlmr1.plan.counts import stage_chunks
from megatron_vlmr1.plan.layout import Layout, decoding_links, layout
from megatron_vlmr1.plan.shapes import plan_shape, read_plan_shape
from megatron_vlmr1.plan.time import Program, program, step_time, useful_flops
from megatron_vlmr1.plan.workload import Packed, Workload, packed, workload

ROOT = Path(__file__).resolve().parents[2]
H100 = hardware.read(ROOT / "configs" / "hardware" / "h100-80gb.yaml")
SHAPES = {size: read_plan_shape(f"qwen2.5-vl-{size}") for size in ("3b", "7b", "32b", "72b")}


RECIPE_72B = config.load(ROOT / "configs" / "recipe" / "72b.yaml")


def place(tp: int = 1, pp: int = 1, dp: int = 1, vp: int = 1, num_layers: int = 80) -> Layout:
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vp,
        sequence_parallel=tp > 1,
    )
    return layout(parallel, num_layers, tp * pp * dp, 8)


def test_rooflines_and_rings_by_hand():
    device, share = Device(H100, "bf16"), H100.efficiency
    large = 2 * 8192.0 * 8192 * 8192 / (989.4e12 * share.matmul_large.value)
    assert device.products([(8192, 8192, 8192)]) == pytest.approx(large)
    # One row: the weights have to be read.
    read = 2 * (8192 * 8192 + 2 * 8192) / (3.35e12 * share.decode.value)
    assert device.products([(1, 8192, 8192)], "decode") == pytest.approx(read)
    assert Device(H100, "fp8").products([(8192, 8192, 8192)], plain=True) == pytest.approx(large)
    gather = device.all_gather("nvlink", 8, 8e9, "x")
    rate, latency = 450e9 * share.nvlink.value, H100.overheads.nvlink_latency_s.value
    assert gather.seconds == pytest.approx(7e9 / rate + 7 * latency)
    assert gather.sent_bytes == {("nvlink", "x"): 7e9}
    assert device.all_reduce("nvlink", 8, 8e9, "x").seconds == pytest.approx(2 * gather.seconds)
    assert device.all_gather("network", 1, 8e9, "x").seconds == 0.0
    with pytest.raises(ValueError, match="a100-80gb has no fp8"):
        Device(hardware.read(ROOT / "configs" / "hardware" / "a100-80gb.yaml"), "fp8")


def test_a_group_with_ranks_on_each_node_crosses_at_each_of_their_adapters():
    device = Device(H100, "bf16")
    assert (place(2, 1, 16).dp_on_node, place(8, 1, 4).dp_on_node, place(2, 4, 2).dp_on_node) == (4, 1, 2)
    one, four = (device.all_gather("network", 16, 16e9, "x", on_node) for on_node in (1, 4))
    assert four.sent_bytes == {("network", "x"): 15e9 / 4, ("nvlink", "x"): pytest.approx(15e9 * 3 / 4)}
    hops = 15 * H100.overheads.network_latency_s.value
    assert four.seconds - hops == pytest.approx((one.seconds - hops) / 4)


def test_links_follow_the_order_of_ranks():
    # Six ranks of 2 x 3 begin anew within a node of eight: the second group lies on two.
    assert (place(2, 4, 3).dp_link, place(2, 1, 3).dp_link, place(6, 1, 4).tp_link) == ("network", "nvlink", "network")
    assert (place(8, 4, 2).tp_link, place(8, 4, 2).dp_link, place(8, 4, 2).pp_link) == ("nvlink", "network", "network")
    assert (place(2, 2, 2).dp_link, place(2, 2, 2).pp_link) == ("nvlink", "nvlink")
    assert decoding_links(place(8, 4, 2), 8, 1)[0] == "nvlink"
    assert decoding_links(place(8, 4, 2), 8, 2) == ("nvlink", "network")
    # Two stages of 4 ranks, 8 ranks apart: a group of 8 for decoding lies on two nodes.
    assert decoding_links(place(4, 2, 2), 8, 1)[0] == "network"
    assert decoding_links(place(4, 2, 1), 8, 1)[0] == "nvlink"


@pytest.mark.parametrize(("size", "tp", "pp"), [("3b", 2, 1), ("3b", 1, 2), ("7b", 4, 2), ("32b", 8, 2), ("72b", 8, 4)])
def test_parameters_are_those_of_the_exact_counts(size, tp, pp):
    shape = SHAPES[size]
    where = place(tp, pp, num_layers=shape.text.num_layers)
    parallel = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    for stage in range(pp):
        exact = sum(chunk.parameters for chunk in stage_chunks(shape, parallel, stage))
        assert sum(passes.stage_parameters(shape, where, stage)) == exact


@pytest.mark.parametrize("recompute", [{}, {"granularity": "full"}, {"granularity": "selective", "modules": ["mlp"]}])
def test_matrix_products_take_their_flops(recompute):
    """At the whole peak, matrix products of training take three forward passes, and what is computed again."""
    shape, where = SHAPES["72b"], place(8, 4, 1)
    free = {f"efficiency.matmul_{name}": 1.0 for name in ("large", "medium", "small")}
    device = Device(hardware.calibrated(H100, free, "assumed"), "bf16")
    work = Workload(4, 1, 2048.0, None, 6144.0, 6144)
    batch = packed(work, 1, 8192, 4, 8)
    assert (batch.count, batch.tokens, batch.labels) == (4, 8192, 6144)  # 8,191 padded to a multiple of 8
    task = passes.Task(device, shape, where, work, batch, RecomputeConfig(**recompute))
    t = shape.text
    mlp = 2 * 3 * t.hidden_size * t.ffn_hidden_size
    layer = 2 * t.hidden_size * (2 * t.hidden_size + 2 * 1024) + mlp
    again = {None: 0, "full": layer, "selective": mlp}[recompute.get("granularity")]
    head = 2 * 6144 * t.hidden_size * t.vocab_size * 4  # backward makes the logits again
    wanted = 4 * (20 * 8192 * (3 * layer + again) + head) / 8 / 989.4e12  # the last stage is the slowest
    assert passes.through(task, train=True, tower=False).seconds_by_part["matmul"] == pytest.approx(wanted, rel=1e-3)


def test_pipeline_bubble():
    """Equal stages idle (p - 1) / v forward and backward times of a micro-batch; nothing passes sooner than alone."""
    shape = SHAPES["72b"]

    def run(count: int, vp: int) -> tuple[float, float]:
        batch = Packed(count=count, images=0, tokens=8192, pairs=1e6, labels=0)
        task = passes.Task(Device(H100, "bf16"), shape, place(8, 4, 1, vp), Workload(1, 1, 1, None, 1, 1), batch)
        cost = passes.through(task, train=True, tower=False)
        return cost.seconds, cost.seconds_by_part["bubble"]

    whole, bubble = run(16, 1)
    each = (whole - bubble) / 16
    assert bubble == pytest.approx(3 * each, rel=0.05)  # the ends hold embedding and head
    assert run(16, 2)[1] == pytest.approx(1.5 * each, rel=0.05)
    assert run(1, 4)[0] == pytest.approx(4 * each, rel=0.05)


def test_packing_is_the_programs():
    """Of alike groups: as many micro-batches, tokens and labels as `plan.load` cuts, which follows `data.packing`."""
    from megatron_vlmr1.plan.load import Load

    for budget in (4096, 8192, 20480, 65536):
        for pp, vp, groups in ((1, 1, 8), (4, 1, 8), (4, 2, 6)):
            cfg = config.load(ROOT / "configs" / "recipe" / "72b.yaml", [f"train.micro_batch_tokens={budget}"])
            parallel = cfg.parallel.model_copy(
                update={
                    "pipeline_model_parallel_size": pp,
                    "virtual_pipeline_model_parallel_size": vp,
                    "pipeline_layers": None,
                }
            )
            train = cfg.train.model_copy(update={"micro_batches": None, "prompts_per_step": groups})
            cfg = cfg.model_copy(update={"parallel": parallel, "train": train})
            exact = Load(groups, 8, 2048, 256, ()).micro_batches(cfg)
            work = workload(cfg, None)
            ours = packed(work, 1, budget, pp, 8)
            real = [batch for batch in exact if batch.labels]
            assert ours.count == len(real)
            assert ours.count * ours.tokens == pytest.approx(sum(batch.tokens for batch in real), rel=0.02)
            assert ours.count * ours.labels == sum(batch.labels for batch in real)


def test_useful_flops_are_what_a_run_reports(tmp_path):
    from megatron_vlmr1.plan.workload import grid_of
    from megatron_vlmr1.train.work import step_flops
    from megatron_vlmr1.types import Completion, Group
    from tests.checkpoints import mixed_prompts, write_random_checkpoint

    directory = write_random_checkpoint(tmp_path / "model")
    shape = read_shape(directory)
    prompt = mixed_prompts(directory)[1]  # an image of 8 x 8 patches
    made = Completion(np.arange(20), np.zeros(20, dtype=np.float32), "length", "")
    group = Group(prompt, (made,) * 4, advantages=np.zeros(4))
    n = len(prompt.token_ids)
    for beta, iterations, frozen in ((0.0, 1, False), (0.1, 1, False), (0.1, 2, True), (0.0, 2, False)):
        cfg = config.parse(
            {
                "model": {"path": "-", "freeze_vision": frozen},
                "data": {"train": "-"},
                "grpo": {"beta": beta, "num_iterations": iterations},
                "rollout": {"num_generations": 4, "max_new_tokens": 20},
                "train": {"prompts_per_step": 1},
            },
            "test",
        )
        assert grid_of(shape.vision, 16) == (8, 8)
        work = Workload(1, 4, float(n), (8, 8), 20.0, 20)
        how = program(cfg, shape.text.num_layers, 1, 8)
        assert useful_flops(plan_shape(shape), how, work) == step_flops([group], [group], shape, cfg)


def played(lengths: np.ndarray, rows: int) -> tuple[int, int]:
    """Play continuous batching through: ticks, and rows fed in all of them. A first token needs no tick."""
    waiting, active, ticks, fed = list(lengths - 1), [], 0, 0
    while waiting or active:
        while waiting and len(active) < rows:
            active.append(waiting.pop(0))
        active = [left for left in active if left > 0]
        if active:
            ticks, fed = ticks + 1, fed + len(active)
            active = [left - 1 for left in active]
    return ticks, fed


@pytest.mark.parametrize(
    ("requests", "rows", "mean"), [(64, 64, 200.0), (512, 64, 200.0), (256, 64, 700.0), (64, 32, 1000.0)]
)
def test_ticks_and_rows_of_a_cache(requests, rows, mean):
    longest = 1000
    lengths = rollout_time.tail(mean, longest)
    random = np.random.default_rng(0)
    ticks = fed = 0
    for _ in range(20):
        drawn = np.full(requests, longest)
        if not math.isinf(lengths.scale):
            drawn = np.minimum(longest, np.ceil(random.exponential(lengths.scale, requests))).astype(int)
        a, b = played(drawn, rows)
        ticks, fed = ticks + a / 20, fed + b / 20
    work = Workload(1, requests, 1.0, None, mean, longest)
    plan = list(rollout_time.ticks_of(lengths, requests, rows, work))
    assert sum(count for count, _, _ in plan) == pytest.approx(ticks, rel=0.12)
    assert sum(count * n for count, n, _ in plan) == pytest.approx(fed, rel=0.12)


@pytest.mark.parametrize(("pp", "copies"), [(1, 4), (2, 2)])
def test_copies_of_the_weights_wait_for_each_other(pp, copies):
    """Each of the copies asks the same ranks for what it has not: all but its own of the four training stages."""
    shape, training, device = SHAPES["72b"], place(8, 4, 1), Device(H100, "bf16")
    which = rollout_time.engine(training, (8, pp), 10**6, 8192, 80)
    parts = rollout_time.rollout(device, shape, which, workload(RECIPE_72B, shape.vision), training)
    held = 2 * sum(passes.stage_parameters(shape, place(8, pp), 0))
    assert which.copies == copies
    wanted = copies * held * (1 - pp / 4) / H100.rates["network"]
    assert parts["copy"].seconds == pytest.approx(wanted, rel=1e-3)


def test_images_are_shared_out_over_tensor_parallel_ranks():
    device, vision = Device(H100, "bf16"), SHAPES["7b"].vision
    one, eight, nine = (layers.tower(device, vision, (70, 72), n, place(8)) for n in (1, 8, 9))
    assert eight.seconds == pytest.approx(one.seconds)
    assert nine.seconds == pytest.approx(2 * one.seconds, rel=0.1)
    assert layers.tower(device, vision, (70, 72), 8, place(1)).seconds == pytest.approx(8 * one.seconds, rel=0.1)


def test_a_step_has_the_phases_of_its_config():
    shape = SHAPES["72b"]
    how, work = program(RECIPE_72B, 80, 64, 8), workload(RECIPE_72B, shape.vision)
    step = step_time(H100, shape, how, work)
    assert list(step.phases) == ["rollout", "reward_exposed", "logprobs", "update", "other"]
    assert step.seconds == pytest.approx(sum(cost.seconds for cost in step.phases.values()))
    # Gradients of the fullest stage in fp32 over two copies, and its weights in bf16.
    sent = step.phases["update"].sent_bytes
    parameters, _ = passes.stage_parameters(shape, how.place, 0)
    assert sent["network", "gradients"] == pytest.approx(2 * parameters, rel=0.1)
    assert sent["network", "weights"] == pytest.approx(parameters, rel=0.1)
    exact = sum(passes.stage_parameters(shape, place(), 0))
    assert step.checkpoint[0] == 2 * exact
    # Four machines have a first rank of a stage, which writes its weights; all eight write the state.
    wanted = step.checkpoint[0] / 4 + step.checkpoint[1] / 8
    assert step.save_s == pytest.approx(wanted / H100.disk_bytes_per_s.value)
    copied = 2 * (step.checkpoint[0] / 4 + step.checkpoint[1] / 64) / H100.rates["pcie"]
    assert step.save_exposed_s == pytest.approx(copied)
    waits = step_time(H100, shape, replace(how, async_save=False), work)
    assert waits.save_exposed_s == pytest.approx(copied + waits.save_s)
    assert step.rates["perf/tokens_per_s_per_gpu"] == pytest.approx(16 * 8 * 256 / step.seconds / 64)
    sft = step_time(H100, shape, Program(how.place, grpo=False), work)
    assert list(sft.phases) == ["update", "other"]


def recipe7() -> config.Config:
    return config.load(ROOT / "configs" / "recipe" / "7b.yaml")


def test_what_makes_a_step_slower():
    shape = SHAPES["7b"]

    def seconds(*overrides: str, gpus: int = 8) -> dict[str, float]:
        cfg = config.load(ROOT / "configs" / "recipe" / "7b.yaml", overrides)
        how = program(cfg, 28, gpus, 8)
        return {p: c.seconds for p, c in step_time(H100, shape, how, workload(cfg, shape.vision)).phases.items()}

    base = seconds()
    # 12 bytes of state for each parameter, of which two copies have half each, to the host and back
    state = sum(passes.stage_parameters(shape, program(recipe7(), 28, 8, 8).place, 0)) / 2 * 12
    for how, times in (("rollout", 1), ("always", 3)):
        more = seconds(f"optimizer.offload={how}", "grpo.num_iterations=3")["update"]
        more -= seconds("grpo.num_iterations=3")["update"]
        assert more == pytest.approx(times * 2 * state / H100.rates["pcie"], rel=1e-3)
    assert seconds("recompute.granularity=full", "recompute.modules=null")["update"] > base["update"]
    assert seconds("rollout.max_new_tokens=512")["rollout"] > 1.7 * base["rollout"]  # prefill stays
    assert seconds("rollout.max_cache_tokens=9216")["rollout"] > 2 * base["rollout"]  # groups one after another
    launched, each = seconds("rollout.cuda_graphs=none")["rollout"], seconds("rollout.decode_burst=1")["rollout"]
    assert base["rollout"] < launched < each == seconds("rollout.decode_burst=1", "rollout.cuda_graphs=none")["rollout"]
    assert "logprobs" not in seconds("grpo.beta=0")
    assert seconds("grpo.num_iterations=2")["update"] == pytest.approx(2 * base["update"])
    # Twice the devices and prompts: the same work, but gradients and weights of 2 x 10^9 parameters cross the network.
    more = seconds("train.prompts_per_step=32", gpus=16)["update"] - base["update"]
    assert 0 < more < 6 * 2.6e9 / H100.rates["network"]


def test_workloads():
    cfg = config.load(ROOT / "configs" / "recipe" / "7b.yaml")
    vision = SHAPES["7b"].vision
    assert workload(cfg, vision).grid == (70, 72)  # 1,260 of at most 1,280 tokens
    assert workload(cfg, vision, 500, 100, 50.0) == Workload(16, 8, 500.0, (20, 20), 50.0, 256)
    assert workload(cfg, vision, image_tokens=0).grid is None
    with pytest.raises(ValueError, match="--completion-tokens 300: from 1 to rollout.max_new_tokens=256"):
        workload(cfg, vision, completion_tokens=300)
    with pytest.raises(ValueError, match="an image of 1260 tokens in a prompt of 100: say how many with --image-tok"):
        workload(cfg, vision, prompt_tokens=100)
    for wrong in (-5.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"--image-tokens {wrong:g}: from 0 to the 2048 tokens of its prompt"):
            workload(cfg, vision, image_tokens=wrong)
    with pytest.raises(ValueError, match="a text model sees no images"):
        workload(cfg, None, image_tokens=5)
