"""Predicted seconds of a step by phase, bytes by link, and what the step makes of the devices. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_vlmr1.config import Config, ParallelConfig, RecomputeConfig, decoding_layout
from megatron_vlmr1.config.rules import FP8_MULTIPLE, ticks_in_a_row
from megatron_vlmr1.plan import passes, rollout_time
from megatron_vlmr1.plan.costs import NOTHING, Cost, Device, total
from megatron_vlmr1.plan.hardware import Hardware
from megatron_vlmr1.plan.layout import Layout, layout
from megatron_vlmr1.plan.shapes import PlanShape
from megatron_vlmr1.plan.workload import Workload, packed
from megatron_vlmr1.telemetry.flops import causal_pairs, language_flops, utilisation, vision_flops

PHASES = ("rollout", "reward_exposed", "logprobs", "update", "other")
"""Of a step; all but the last are `time/` metrics of a run. Data is read ahead, and costs nothing that is seen."""

_STAGED_COPIES = 2  # a checkpoint's bytes are copied to host memory, and from there into buffers that are written


@dataclass(frozen=True)
class Program:
    """What the time of a step depends on besides the model, the hardware and the work.

    Attributes:
        place: training's layout.
        decoding: (tensor, pipeline) of the copy that generates, if there is one.
        micro_batch_tokens: of training, at most.
        micro_batches: at least so many; None: as many as stages.
        recompute: activations that are computed again.
        freeze_vision: whether the tower is fixed.
        grpo: whether there is a rollout; else one completion is given.
        beta: whether there is a reference.
        iterations: optimizer steps on each rollout.
        max_cache_tokens: of a rank.
        max_prefill_tokens: of one pass.
        precision: of layers in training; generation is in bf16 where that is fp8.
        offloads: how often in a step the optimizer's state goes to the host and comes back.
        async_save: whether checkpoints are written while training goes on.
        decode_burst: ticks of decoding in a row; None: the default of the hardware.
        graphs: whether, on CUDA, ticks are launched as CUDA graphs; here, those of bursts.
        overlap: whether gradients, gathered weights and tensor-parallel sums hide behind compute; here they do not.
    """

    place: Layout
    decoding: tuple[int, int] | None = None
    micro_batch_tokens: int = 8192
    micro_batches: int | None = None
    recompute: RecomputeConfig = RecomputeConfig()
    freeze_vision: bool = False
    grpo: bool = True
    beta: bool = True
    iterations: int = 1
    max_cache_tokens: int = 1 << 60
    max_prefill_tokens: int = 1 << 60
    precision: str = "bf16"
    offloads: int = 0
    async_save: bool = True
    decode_burst: int | None = 1
    graphs: bool = False
    overlap: bool = False


def program(cfg: Config, num_layers: int, world: int, per_node: int) -> Program:
    """Return what a config says.

    Raises:
        ValueError: ranks or layers do not divide.
    """
    stages = (decoding_layout(cfg) or cfg.parallel).pipeline_model_parallel_size
    iterations = cfg.grpo.num_iterations if cfg.method == "grpo" else 1
    return Program(
        place=layout(cfg.parallel, num_layers, world, per_node),
        decoding=_sizes(decoding_layout(cfg)),
        micro_batch_tokens=cfg.train.micro_batch_tokens,
        micro_batches=cfg.train.micro_batches,
        recompute=cfg.recompute,
        freeze_vision=cfg.model.freeze_vision,
        grpo=cfg.method == "grpo",
        beta=cfg.grpo.beta > 0,
        iterations=iterations,
        max_cache_tokens=cfg.rollout.max_cache_tokens,
        max_prefill_tokens=cfg.rollout.max_prefill_tokens,
        precision=cfg.precision.products,
        decode_burst=cfg.rollout.decode_burst,
        graphs=cfg.rollout.cuda_graphs == "auto" and ticks_in_a_row(cfg.rollout.decode_burst, stages, cuda=True) > 1,
        async_save=cfg.train.async_save,
        offloads={"none": 0, "rollout": int(cfg.method == "grpo"), "always": iterations}[cfg.optimizer.offload],
    )


def _sizes(given: ParallelConfig | None) -> tuple[int, int] | None:
    return None if given is None else (given.tensor_model_parallel_size, given.pipeline_model_parallel_size)


@dataclass(frozen=True)
class StepTime:
    """A predicted step.

    Attributes:
        phases: what each takes, by part, and what a rank sends in it; those of `PHASES` that there are.
        world: ranks.
        micro_batches: of a rank in one pass.
        language_flops: useful ones of a step, all ranks.
        vision_flops: the same of the tower.
        trained_tokens: of completions, in a step.
        sequence_tokens: of completions, and of the prompt once for each: as others count.
        peak: FLOP/s of a device.
        checkpoint: (bytes of weights, bytes of optimizer state).
        save_s: to write a checkpoint.
        save_exposed_s: of it, what training waits for.
    """

    phases: Mapping[str, Cost]
    world: int
    micro_batches: int
    language_flops: float
    vision_flops: float
    trained_tokens: float
    sequence_tokens: float
    peak: float
    checkpoint: tuple[int, int]
    save_s: float
    save_exposed_s: float

    @property
    def seconds(self) -> float:
        """Of the step, checkpoints aside."""
        return sum(cost.seconds for cost in self.phases.values())

    @property
    def rates(self) -> dict[str, float]:
        """perf/{tflops,mfu_lm,mfu_vit,tokens_per_s_per_gpu} as a run reports them; sequence_tokens_per_s_per_gpu."""
        each = self.seconds * self.world
        rates = utilisation(self.language_flops, self.vision_flops, self.seconds, self.world, self.peak)
        rates["perf/tokens_per_s_per_gpu"] = self.trained_tokens / each
        rates["sequence_tokens_per_s_per_gpu"] = self.sequence_tokens / each
        return rates


def step_time(hardware: Hardware, shape: PlanShape, how: Program, work: Workload, rollout: bool = True) -> StepTime:
    """Predict a step; without its rollout, on request.

    Raises:
        ValueError: the hardware lacks the precision, or the cache holds no completion.
    """
    task = training_task(Device(hardware, how.precision), shape, how, work)
    phases: dict[str, Cost] = {}
    if how.grpo:
        if rollout:
            phases["rollout"] = total(rollout_parts(hardware, shape, how, work).values())
        phases["reward_exposed"] = Cost({"rewards": hardware.overheads.rewards_s.value})
        if how.beta or how.iterations > 1:
            phases["logprobs"] = _logprobs(task, how)
    phases["update"] = update(task, how)
    phases["other"] = Cost({"step": hardware.overheads.step_s.value})
    language, vision = useful_flops(shape, how, work)
    weights, state = passes.checkpoint_bytes(shape, how.freeze_vision, task.device.item)
    save_s, copy_s = _save(hardware, how.place, weights, state)
    return StepTime(
        phases=phases,
        world=how.place.world,
        micro_batches=task.batch.count,
        language_flops=language,
        vision_flops=vision,
        trained_tokens=work.prompts * work.generations * work.completion_tokens,
        sequence_tokens=work.prompts * work.generations * (work.prompt_tokens + work.completion_tokens),
        peak=hardware.peak(how.precision),
        checkpoint=(weights, state),
        save_s=save_s,
        save_exposed_s=copy_s if how.async_save else copy_s + save_s,
    )


def _save(hardware: Hardware, place: Layout, weights: int, state: int) -> tuple[float, float]:
    """Return the seconds in which a checkpoint is written, and in which a rank copies its part before that.

    The first rank of each stage has the stage's weights (`checkpoint.writer`), every rank its shard of the state.
    """
    each = weights / place.first_nodes + state / place.nodes
    copied = _STAGED_COPIES * (weights / place.pp + state / place.world)
    return each / hardware.disk_bytes_per_s.value, copied / hardware.rates["pcie"]


def training_task(device: Device, shape: PlanShape, how: Program, work: Workload) -> passes.Task:
    """Return a program's micro-batches on its layout."""
    place = how.place
    batch = packed(
        work,
        place.dp,
        how.micro_batch_tokens,
        how.micro_batches or place.pp,
        (place.tp if place.sequence_parallel else 1) * (FP8_MULTIPLE if how.precision == "fp8" else 1),
    )
    return passes.Task(device, shape, place, work, batch, how.recompute, how.freeze_vision)


def rollout_parts(hardware: Hardware, shape: PlanShape, how: Program, work: Workload) -> dict[str, Cost]:
    """Return a rollout: copy, prefill, decode."""
    stages = how.place.pp if how.decoding is None else how.decoding[1]
    burst = ticks_in_a_row(how.decode_burst, stages, hardware.device == "cuda")
    device = Device(hardware, "bf16" if how.precision == "fp8" else how.precision, how.graphs)
    which = rollout_time.engine(
        how.place, how.decoding, how.max_cache_tokens, how.max_prefill_tokens, shape.text.num_layers, burst
    )
    return rollout_time.rollout(device, shape, which, work, how.place)


def _logprobs(task: passes.Task, how: Program) -> Cost:
    """Return passes without gradients: of the policy before several optimizer steps, and of the reference."""
    old = passes.through(task, train=False, tower=False) if how.iterations > 1 else NOTHING
    if not how.beta:
        return old
    # A frozen tower's embeddings are those that the rollout kept.
    return total((old, passes.through(task, train=False, tower=not how.freeze_vision), passes.reference_swap(task)))


def update(task: passes.Task, how: Program) -> Cost:
    """Return the optimizer steps on one rollout."""
    once = passes.through(task, train=True, tower=not how.freeze_vision)
    tower = NOTHING
    if how.freeze_vision and not how.grpo:  # nobody else has asked for its embeddings
        tower = passes.through(task, train=False, tower=True)
    end = passes.after_backward(task)
    if how.overlap:
        once, end = once.without("tensor parallel", "pipeline"), end.without("gradients", "weights")
    away = passes.offloaded_state(task) * how.offloads if how.offloads else NOTHING
    return total((tower, (once + end) * how.iterations, away))


def useful_flops(shape: PlanShape, how: Program, work: Workload) -> tuple[float, float]:
    """Return the FLOPs of a step as `train.work.step_flops` counts them: (language model, tower)."""
    prompt, length = round(work.prompt_tokens), work.completion_tokens
    fed = work.generations * (length - 1)
    pairs = causal_pairs(prompt) + work.generations * causal_pairs(round(length - 1), prompt)
    forward = work.prompts * language_flops(shape.text, round(prompt + fed), pairs, round(work.generations * length))
    steps = how.iterations
    again = (how.grpo and how.beta) + (steps > 1)
    language = forward * (again + 3 * steps + how.grpo)
    if work.grid is None or shape.vision is None:
        return float(language), 0.0
    tower = work.prompts * vision_flops(shape.vision, [(1, *work.grid)])
    if how.freeze_vision:
        return float(language), float(tower)
    asked = tower if how.grpo or steps > 1 else 0
    return float(language), float(asked + ((how.grpo and how.beta) + 3 * steps) * tower)
