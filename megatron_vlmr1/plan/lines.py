"""A plan in a few lines of text, as `vlmr1 train --dry-run` shows it. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_vlmr1.config import Config
from megatron_vlmr1.plan.memory import Device, RankMemory, rank_memory
from megatron_vlmr1.plan.shapes import PlanShape
from megatron_vlmr1.telemetry.flops import causal_pairs, language_flops

_WHERE = {"cpu": "a CPU", "cuda": "a GPU"}


def lines(cfg: Config, shape: PlanShape, world: int) -> Iterator[str]:
    """Yield the layout, the largest step, and the memory of each pipeline stage; fp32 is planned for a CPU.

    Raises:
        ValueError: the ranks, the layout or the cache do not fit.
    """
    tp, pp = cfg.parallel.tensor_model_parallel_size, cfg.parallel.pipeline_model_parallel_size
    device: Device = "cpu" if cfg.precision.dtype == "fp32" else "cuda"
    stages = rank_memory(cfg, shape, world, device)
    tokens, flops = step_work(cfg, shape)
    vp = cfg.parallel.virtual_pipeline_model_parallel_size
    virtual = f" (in {vp} virtual stages)" if vp > 1 else ""
    yield f"{world} ranks: tensor {tp} x pipeline {pp}{virtual} x data {world // (tp * pp)}"
    yield f"a step: at most {tokens:,} language tokens in the update, {flops / 1e12:,.3g} TFLOP"
    for stage in stages:
        yield _line(stage, _WHERE[device])


def _line(memory: RankMemory, where: str) -> str:
    phase, most = memory.worst()
    peaks = ", ".join(f"{name} {_mb(memory.peak(name))}" for name in memory.phases)
    held = ", ".join(f"{part} {_mb(count)}" for part, count in memory.phases[phase].items() if count)
    host = ", ".join(f"{part} {_mb(count)}" for part, count in memory.host.items() if count)
    return (
        f"a rank of stage {memory.stage}: {memory.parameters:,} parameters; at most {_mb(most)} of {where}, in the "
        f"{phase} ({held}); peaks: {peaks}; host memory: {host}"
    )


def step_work(cfg: Config, shape: PlanShape) -> tuple[int, float]:
    """Return the largest step's language tokens of the update, and FLOPs of the language model, over all ranks."""
    grpo = cfg.method == "grpo"
    generations = cfg.rollout.num_generations if grpo else 1
    prompts, prompt, new = cfg.train.prompts_per_step, cfg.data.max_prompt_tokens, cfg.rollout.max_new_tokens
    tokens = prompts * (prompt + generations * new)
    pairs = prompts * (causal_pairs(prompt) + generations * causal_pairs(new, prompt))
    forward = language_flops(shape.text, tokens, pairs, prompts * generations * new)
    rounds, iterations = max(1, cfg.grpo.dynamic_sampling_rounds), cfg.grpo.num_iterations if grpo else 1
    passes = 3 + grpo * (rounds + (cfg.grpo.beta > 0) + (iterations > 1)) + 3 * (iterations - 1)
    return tokens, float(passes * forward)


def _mb(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
