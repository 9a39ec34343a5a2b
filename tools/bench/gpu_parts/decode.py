"""Decoding: tokens a second at batches of 8 to 256, and the share of what the memory's bandwidth allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from megatron_vlmr1.models.policy import Policy
from megatron_vlmr1.parallel.mesh import Mesh
from megatron_vlmr1.plan.rollout_time import LAYER_KERNELS, SAMPLING_KERNELS
from megatron_vlmr1.rollout import graphs
from megatron_vlmr1.rollout.engine import Engine
from megatron_vlmr1.rollout.sampling import Sampling
from megatron_vlmr1.telemetry.flops import language_flops
from megatron_vlmr1.types import Prompt
from tools.bench.gpu_parts import models
from tools.bench.gpu_parts.measuring import Bench, NotMeasured, Row

BATCHES = (8, 16, 32, 64, 128, 256)
FEW = (8, 64)  # batches of ways that are measured less thoroughly
_SHORT, _LONG = 16, 112  # ticks of two runs, whose difference is decoding alone


def measure(bench: Bench, mesh: Mesh) -> None:
    """Measure both models: kernel by kernel, as CUDA graphs, and so with the layers' matrices in FP8."""
    for size in models.sizes(bench):
        made: dict[str, Policy] = {}  # made once, if it can be
        eager: dict[int, float] = {}  # tokens/s by batch
        for way in _ENGINES:
            for batch in (4, 8) if bench.tiny else FEW if way == "fp8 weights" else BATCHES:
                measured = partial(_case, bench, mesh, size, made, way, batch, eager)
                if row := bench.case(f"{size} x {batch}, {way}", measured, 4):
                    bench.rates["decode"] = max(row.bytes / row.seconds, bench.rates.get("decode", 0.0))
    if row := bench.case("a tick beside its kernels", partial(_tick, bench, mesh), 10):
        bench.rates["tick"] = row.figures["s"]


def _as_graphs(bench: Bench) -> dict[str, Any]:
    if not bench.cuda:
        raise NotMeasured("CUDA graphs need CUDA")
    return {"recorder": graphs.recorder("auto")}


# The options of the engine, by the way in which it decodes.
_ENGINES: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "eager": lambda _: {"decode_burst": 1},
    "graphs": _as_graphs,
    "fp8 weights": lambda _: {"quantization": "fp8"},
}


def _case(
    bench: Bench, mesh: Mesh, size: str, made: dict[str, Policy], way: str, batch: int, eager: dict[int, float]
) -> Row:
    cfg, options = models.settings(bench), _ENGINES[way](bench)
    if size not in made:
        made[size] = models.policy(mesh, models.shape(bench, size), cfg)
        for parameter in made[size].parameters():
            parameter.requires_grad_(False)
    policy, load = made[size], models.work(bench).load
    engine = models.engine(policy, cfg, **options)
    prompts = models.prompts(policy.shape, replace(load, prompts=max(1, batch // load.generations)))
    rows = len(prompts) * load.generations
    seconds, own = _seconds_of_a_tick(bench, engine, prompts, load.generations)
    moved = _bytes(policy, prompts, rows, own, way == "fp8 weights")
    figures = {"tokens_per_s": rows / seconds, "tick_s": seconds, **bench.share("copy", moved / seconds)}
    if way == "eager":
        eager[batch] = figures["tokens_per_s"]
    elif batch in eager:
        figures["times_eager"] = figures["tokens_per_s"] / eager[batch]
    text = policy.shape.text
    pairs = round(rows * (load.prompt_tokens + own))
    setting = (
        f"{size}, {text.num_layers} layers, bf16, {len(prompts)} prompts of {load.prompt_tokens} tokens x "
        f"{load.generations}, {own:.0f} own tokens on average, the whole distribution sampled, {way}"
    )
    return Row(figures, setting, float(language_flops(text, rows, pairs, rows)), moved, seconds)


def _seconds_of_a_tick(bench: Bench, engine: Engine, prompts: list[Prompt], generations: int) -> tuple[float, float]:
    """Return the seconds of a tick in which all rows are decoded, and the own tokens that a row has on average."""
    short, long = (2, 8) if bench.tiny else (_SHORT, _LONG)
    sampling = Sampling(long, frozenset(), seed=1)  # in both runs, so that caches are alike

    def run(ticks: int) -> float:
        limits = [[ticks] * generations] * len(prompts)
        return bench.wall_seconds(lambda: engine.generate(prompts, generations, sampling, limits=limits))

    ends = run(short), run(long)
    engine.release()
    if ends[1] <= ends[0]:
        raise NotMeasured(f"{long} ticks took no longer than {short}: this machine is too busy")
    return (ends[1] - ends[0]) / (long - short), (short + long) / 2


def _bytes(policy: Policy, prompts: list[Prompt], rows: int, own: float, in_fp8: bool = False) -> float:
    """Return the bytes that a tick reads: the layers' and the output layer's weights, and keys and values.

    A prompt's are read once for all its completions. `in_fp8`: the layers' matrices have a byte a number.
    """
    (chunk,) = policy.chunks
    text, item = policy.shape.text, policy.output_weight().element_size()
    weights = policy.output_weight().nbytes + sum(
        parameter.numel() if in_fp8 and parameter.dim() == 2 else parameter.nbytes
        for parameter in chunk.language.decoder.parameters()
    )
    tokens = sum(len(prompt.token_ids) for prompt in prompts) + rows * own
    return float(weights + tokens * text.num_layers * 2 * text.num_kv_heads * text.head_dim * item)


def _tick(bench: Bench, mesh: Mesh) -> Row:
    """Time ticks of a model of one layer, less what the plan says that its kernels' launches take."""
    cfg = models.settings(bench)
    engine = models.engine(models.policy(mesh, models.shape(bench, "3b", 1), cfg), cfg, decode_burst=1)
    load = models.work(bench).load
    prompts = models.prompts(engine.policy.shape, replace(load, prompts=1))
    seconds, _ = _seconds_of_a_tick(bench, engine, prompts, load.generations)
    launches = (LAYER_KERNELS + SAMPLING_KERNELS) * bench.rates.get("launch", 0.0)
    if seconds <= launches:
        raise NotMeasured(f"a tick took {seconds:.2g} s, and launches alone should take {launches:.2g}")
    setting = (
        f"a tick of one layer of 3b and {load.generations} rows, {seconds:.4g} s, less {launches:.4g} s of launches"
    )
    return Row({"s": seconds - launches}, setting)
