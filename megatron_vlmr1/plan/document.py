"""A plan as one document: what ``vlmr1 plan --json`` prints, and what its tables are made of. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from megatron_vlmr1.config import Config
from megatron_vlmr1.plan.costs import Cost
from megatron_vlmr1.plan.hardware import Hardware
from megatron_vlmr1.plan.memory import RankMemory, rank_memory
from megatron_vlmr1.plan.recommend import ALIKE, MARGIN, Choice, Recommendation, check, misfit, recommend, room
from megatron_vlmr1.plan.shapes import PlanShape
from megatron_vlmr1.plan.time import StepTime, program, step_time
from megatron_vlmr1.plan.workload import Workload

Document = dict[str, Any]


def document(cfg: Config, shape: PlanShape, hardware: Hardware, world: int, work: Workload) -> Document:
    """Return the config's own layout, or why it is refused under ``own.refused``, and what is recommended.

    Returns:
        ``own``, ``best`` and ``second`` (null where there is none) with ``layout``, ``step_s``, ``phases``, ``memory``,
        ``host_bytes``, ``host_peak_bytes``, ``rates``, ``flops`` and ``checkpoint``; seconds, bytes and FLOPs. Where
        nothing fits, ``nearest`` needs the least, and ``fits_from`` says how many devices would do.
    """
    found = recommend(cfg, shape, hardware, world, work)
    choices = [_choice(choice, cfg) for choice in found.choices] + [None, None]
    out: Document = {
        "model": shape.name,
        "gpu": hardware.name,
        "gpus": world,
        "memory_bytes": hardware.memory_bytes.value,
        "usable_bytes": room(hardware),
        "margin": MARGIN,
        "workload": asdict(work),
        "own": _own(cfg, shape, hardware, world, work),
        "best": choices[0],
        "second": choices[1],
        "settings": found.settings,
        "refused": dict(found.refused),
        "quicker_without_room": found.faster,
        "nearest": None,
        "fits_from": None if found.choices else _fits_from(cfg, shape, hardware, world, work),
    }
    if found.nearest is not None:
        setting, need = found.nearest
        out["nearest"] = {"overrides": setting.overrides(cfg), "peak_bytes": need}
    if found.choices:
        out["best"]["why"] = _why_best(found)
    if len(found.choices) > 1:
        out["second"]["why"] = _why_second(*found.choices)
    return out


def _fits_from(cfg: Config, shape: PlanShape, hardware: Hardware, world: int, work: Workload) -> Document | None:
    """Return how many devices would do, in doublings, and with what; None where 16 times as many do not."""
    for gpus in (world << doubling for doubling in range(1, 5)):
        if choices := recommend(cfg, shape, hardware, gpus, work).choices:
            return {"gpus": gpus, "overrides": choices[0].setting.overrides(cfg)}
    return None


def _own(cfg: Config, shape: PlanShape, hardware: Hardware, world: int, work: Workload) -> Document:
    try:
        check(cfg, shape, world)
    except ValueError as error:
        return {"refused": str(error)}
    memory = rank_memory(cfg, shape, world, hardware.device)
    how = program(cfg, shape.text.num_layers, world, hardware.devices_per_node)
    out = {"layout": _layout(cfg, world), **_planned(step_time(hardware, shape, how, work), memory)}
    if problem := misfit(memory, hardware, min(world, hardware.devices_per_node)):
        out["refused"] = problem
    return out


def _choice(choice: Choice, cfg: Config) -> Document:
    chosen = choice.setting.of(cfg)
    return {
        "overrides": choice.setting.overrides(cfg),
        "layout": _layout(chosen, choice.time.world),
        **_planned(choice.time, choice.memory),
    }


def _layout(cfg: Config, world: int) -> Document:
    parallel, rollout = cfg.parallel, cfg.rollout
    return {
        "tensor": parallel.tensor_model_parallel_size,
        "pipeline": parallel.pipeline_model_parallel_size,
        "virtual": parallel.virtual_pipeline_model_parallel_size,
        "data": parallel.data_parallel_size(world),
        "pipeline_layers": parallel.pipeline_layers,
        "sequence_parallel": parallel.sequence_parallel,
        "micro_batch_tokens": cfg.train.micro_batch_tokens,
        "recompute": cfg.recompute.model_dump(exclude_none=True),
        "generation": [rollout.tensor_model_parallel_size, rollout.pipeline_model_parallel_size],
    }


def _planned(step: StepTime, memory: list[RankMemory]) -> Document:
    return {
        "step_s": step.seconds,
        "micro_batches": step.micro_batches,
        "phases": {phase: _cost(cost) for phase, cost in step.phases.items()},
        "rates": step.rates,
        "flops": {"language": step.language_flops, "vision": step.vision_flops},
        "memory": [
            {"stage": rank.stage, "parameters": rank.parameters, "phases": rank.phases, "worst": rank.worst()}
            for rank in memory
        ],
        "host_bytes": (most := max(memory, key=lambda rank: rank.host_peak)).host,
        "host_peak_bytes": most.host_peak,
        "checkpoint": {
            "weights_bytes": step.checkpoint[0],
            "optimizer_bytes": step.checkpoint[1],
            "write_s": step.save_s,
            "exposed_s": step.save_exposed_s,
        },
    }


def _cost(cost: Cost) -> Document:
    sent: dict[str, dict[str, float]] = {}
    for (link, what), count in cost.sent_bytes.items():
        sent.setdefault(link, {})[what] = count
    return {"seconds": cost.seconds, "parts": dict(cost.seconds_by_part), "sent_bytes": sent}


def _why_best(found: Recommendation) -> list[str]:
    best = found.choices[0]
    phase, cost = max(best.time.phases.items(), key=lambda pair: pair[1].seconds)
    part, seconds = max(cost.seconds_by_part.items(), key=lambda pair: pair[1])
    share = cost.seconds / best.time.seconds
    lines = [
        f"the quickest step of {found.settings:,} settings; of those within {ALIKE:.0%} of it the plainest",
        f"{phase} takes {share:.0%} of its step, most of that {part} ({seconds:.2f} s)",
    ]
    too_few = sum(count for reason, count in found.refused.items() if reason.startswith("train.prompts_per_step"))
    if too_few > found.settings / 2:
        lines.append(
            "train.prompts_per_step allows few data-parallel copies; a larger step would use the devices better"
        )
    if found.faster:
        lines.append(f"{found.faster:,} settings would be quicker and do not fit")
    return lines


def _why_second(best: Choice, second: Choice) -> list[str]:
    """Return in which phases and parts the second differs most."""
    more = second.time.seconds - best.time.seconds
    rank = "slower" if more > 0 else "quicker, which a prediction cannot tell, and less plain"
    lines = [f"the best with another tensor or pipeline size: {abs(more):.2f} s {rank}"]
    phases = {phase: second.time.phases[phase].seconds - cost.seconds for phase, cost in best.time.phases.items()}
    for phase in sorted(phases, key=lambda phase: -abs(phases[phase]))[:2]:
        a, b = (choice.time.phases[phase].seconds_by_part for choice in (best, second))
        parts = {part: b.get(part, 0.0) - a.get(part, 0.0) for part in {*a, *b}}
        largest = sorted(parts, key=lambda part: -abs(parts[part]))[:2]
        said = ", ".join(f"{part} {parts[part]:+.2f}" for part in largest if abs(parts[part]) >= 0.005)
        lines.append(f"{phase} {phases[phase]:+.2f} s" + (f" ({said})" if said else ""))
    saved = (second.peak - best.peak) / 1e9
    lines.append(f"its fullest rank holds {abs(saved):.1f} GB {'more' if saved > 0 else 'less'}")
    return lines


def fullest(plan: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the stage of a plan whose rank holds the most."""
    return max(plan["memory"], key=lambda stage: stage["worst"][1])  # type: ignore[no-any-return]
