"""A whole GRPO step of one GPU: seconds and peaks of memory by phase, beside the plan's; nobody is rewarded."""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron_vlmr1.config import Config
from megatron_vlmr1.grpo.reference import Reference
from megatron_vlmr1.grpo.update import GrpoUpdate, Updater
from megatron_vlmr1.parallel import optimizer as parallel_optimizer
from megatron_vlmr1.parallel.mesh import Mesh
from megatron_vlmr1.plan.memory import rank_memory
from megatron_vlmr1.plan.shapes import plan_shape
from megatron_vlmr1.rollout.sampling import Sampling
from megatron_vlmr1.runtime import device
from megatron_vlmr1.telemetry.flops import peak_flops
from megatron_vlmr1.telemetry.timers import PhaseTimers
from megatron_vlmr1.train.work import step_flops
from megatron_vlmr1.types import Group
from tools.bench.gpu_parts import models
from tools.bench.gpu_parts.measuring import Bench, NotMeasured, Row

_PHASES = ("rollout", "logprobs", "update")
_SIZE = "3b"
_BETA = 0.04


def measure(bench: Bench, mesh: Mesh) -> None:
    """Measure a step as the recipe has it, and one whose optimizer state is away during the rollout."""
    for when in ("none", "rollout"):
        bench.case(f"{_SIZE}, optimizer.offload={when}", partial(_measured, bench, mesh, when), 25)


def _measured(bench: Bench, mesh: Mesh, when: str) -> Row:
    cfg = models.settings(bench, grpo={"beta": _BETA}, optimizer={"offload": when})
    count = models.layers_that_fit(bench, _SIZE, cfg, _PHASES)
    return models.with_fewer_layers(count, partial(_steps, bench, mesh, cfg))


def _steps(bench: Bench, mesh: Mesh, cfg: Config, count: int) -> Row:
    made = models.shape(bench, _SIZE, count)
    policy = models.policy(mesh, made, cfg)
    reference = Reference(policy)
    timers = PhaseTimers(bench.wait, peak_bytes=device.peak_bytes if bench.cuda else None)
    optimizer = parallel_optimizer.build(cfg.optimizer, policy.wrap_for_training())
    update = GrpoUpdate(Updater(policy, optimizer, cfg), reference, timers)
    step, engine = models.work(bench), models.engine(policy, cfg)
    for seed in range(2):  # the first allocates, and compiles what is compiled
        groups = _step(update, engine, models.prompts(made, step.load), step, timers, seed)
        seconds, peaks = timers.take(), timers.take_peaks()
    whole = sum(seconds.values())
    language, tower = step_flops(groups, groups, made, cfg)
    figures = {f"{name.removeprefix('time/')}_s": value for name, value in seconds.items()} | {"step_s": whole}
    figures["tflops"] = (language + tower) / whole / 1e12
    if peak := peak_flops(device.name(), cfg.precision.products):
        figures["mfu"] = (language + tower) / whole / peak
    figures["completions_per_s"] = step.lengths().size / whole
    if bench.cuda:
        (planned,) = rank_memory(cfg, plan_shape(made), 1, "cuda", step.load)
        for phase in _PHASES:
            figures[f"{phase}_peak_gb"] = peaks[phase] / 1e9
            figures[f"{phase}_planned_gb"] = (planned.peak(phase) - planned.phases[phase]["runtime"]) / 1e9
    setting = (
        f"{_SIZE}, {models.in_layers(made, models.shape(bench, _SIZE))} and the whole tower and vocabulary, bf16, "
        f"{policy.layers.spec} spec, beta {_BETA}; {step.words()}; no rewards, no checkpoint"
    )
    return Row(figures, setting, float(language + tower), 0.0, whole)


def _step(
    update: GrpoUpdate, engine: Any, prompts: list[Any], step: models.Work, timers: PhaseTimers, seed: int
) -> list[Group]:
    """Take a step as `train.grpo` does, with drawn advantages."""
    updater, lengths = update.updater, step.lengths()
    updater.offload.before_generation()
    sampling = Sampling(step.load.new_tokens, frozenset(), seed=seed)
    with timers("rollout"):
        rows = engine.generate(prompts, step.load.generations, sampling, limits=lengths.tolist())
    engine.release()
    drawn = models.groups(prompts, lengths)
    groups = [Group(group.prompt, row, (), group.advantages) for group, row in zip(drawn, rows, strict=True)]
    with timers("update"):
        metrics = update(groups, 1e-6)
    if metrics["train/skipped"]:
        raise NotMeasured("loss or gradients are not finite")
    updater.policy.forget_features()
    return groups
