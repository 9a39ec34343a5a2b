"""Models of published shape with random weights, made on the device, and a step's prompts and completions for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from megatron_vlmr1 import config
from megatron_vlmr1.checkpoint.locate import hf_directory
from megatron_vlmr1.config import Config
from megatron_vlmr1.models.families import read_shape
from megatron_vlmr1.models.policy import Policy
from megatron_vlmr1.models.shape import VlmShape
from megatron_vlmr1.models.specs import layers
from megatron_vlmr1.parallel.mesh import Mesh
from megatron_vlmr1.plan.load import Load
from megatron_vlmr1.plan.memory import rank_memory
from megatron_vlmr1.plan.shapes import plan_shape
from megatron_vlmr1.rollout.engine import Engine
from megatron_vlmr1.runtime import device
from megatron_vlmr1.types import Completion, Group, IntArray, Prompt
from tools.bench import common, memory_step, tiny
from tools.bench.gpu_parts.measuring import Bench, NotMeasured, Row, free

SIZES = ("3b", "7b")
STD = 0.02
FREE = 0.9  # of the memory that is free, which a plan may fill


@dataclass(frozen=True)
class Work:
    """A step: prompts of one image each, and long-tailed completions."""

    load: Load
    mean: int  # tokens of a completion
    micro_batch_tokens: int

    def lengths(self) -> IntArray:
        """Return tokens of each completion [prompts, generations]."""
        load = self.load
        drawn = tiny.long_tailed_lengths(load.prompts * load.generations, mean=self.mean, longest=load.new_tokens)
        return drawn.reshape(load.prompts, load.generations)

    def words(self) -> str:
        """Return what it is."""
        load = self.load
        return (
            f"{load.prompts} prompts of {load.prompt_tokens} tokens with an image of "
            f"{load.grids[0][1]} x {load.grids[0][2]} patches, x {load.generations} completions of {self.mean} tokens "
            f"on average (at most {load.new_tokens}), micro-batches of {self.micro_batch_tokens} tokens"
        )


# A picture of 640 x 480 pixels, resized to multiples of 28, with a REC question; a step of one GPU of eight.
REAL = Work(Load(16, 8, 512, 256, ((1, 34, 46),)), 128, 8192)
TINY = Work(Load(2, 4, 48, 8, ((1, 8, 8),)), 5, 128)


def sizes(bench: Bench) -> tuple[str, ...]:
    """Return the models that are measured; with tiny shapes they would all be the same one."""
    return SIZES[:1] if bench.tiny else SIZES


def work(bench: Bench) -> Work:
    """Return the step that is run."""
    return TINY if bench.tiny else REAL


def shape(bench: Bench, size: str, num_layers: int | None = None) -> VlmShape:
    """Return the numbers of a model, with fewer layers if asked."""
    directory = hf_directory("asset:tiny_vlm") if bench.tiny else common.ROOT / f"configs/model/qwen2.5-vl-{size}"
    whole = read_shape(directory)
    return replace(whole, text=replace(whole.text, num_layers=num_layers or whole.text.num_layers))


def settings(bench: Bench, **sections: Any) -> Config:
    """Return a run's settings for `work`: bf16, the tower trained and computed again, no reference."""
    step = work(bench)
    raw: dict[str, Any] = {
        "model": {"path": "-"},
        "data": {"train": "-", "max_prompt_tokens": step.load.prompt_tokens},
        "recompute": {"tower": True},
        "rollout": {"num_generations": step.load.generations, "max_new_tokens": step.load.new_tokens},
        "grpo": {"beta": 0.0},
        "train": {"prompts_per_step": step.load.prompts, "micro_batch_tokens": step.micro_batch_tokens},
    }
    for name, value in sections.items():
        raw[name] = raw.get(name, {}) | value
    return config.parse(raw, "gpu.py")


def layers_that_fit(bench: Bench, size: str, cfg: Config, phases: Sequence[str]) -> int:
    """Return the layers that the device has room for, by the plan, all of them at most.

    Raises:
        NotMeasured: not even two.
    """
    whole = shape(bench, size)
    if not bench.cuda:
        return whole.text.num_layers
    room = FREE * torch.cuda.mem_get_info()[0]

    def fits(count: int) -> bool:
        (rank,) = rank_memory(cfg, plan_shape(shape(bench, size, count)), 1, "cuda", work(bench).load)
        return max(rank.peak(phase) for phase in phases) <= room

    for count in range(whole.text.num_layers, 1, -1):
        if fits(count):
            return count
    raise NotMeasured(f"memory is short: {room / 1e9:.0f} GB have no room for two layers of {size}")


def policy(mesh: Mesh, of: VlmShape, cfg: Config) -> Policy:
    """Return a model with random weights.

    Raises:
        ValueError: the device lacks what the config asks for; one line.
    """
    banned = [of.image_token_id, of.video_token_id, of.vision_start_token_id]
    dtype = device.DTYPES[cfg.precision.dtype]
    made = Policy(of, mesh, dtype, banned, cfg.model.freeze_vision, cfg.recompute, layers(cfg))
    with torch.no_grad():
        for name, parameter in (pair for chunk in made.chunks for pair in chunk.named_parameters()):
            parameter.normal_(1.0 if "norm" in name or "ln_q" in name else 0.0, STD)
    return made


def engine(policy: Policy, cfg: Config, **options: Any) -> Engine:
    """Return what generates; texts are empty, as there is no tokenizer."""
    return Engine(policy, lambda ids: "", cfg.rollout.max_cache_tokens, cfg.rollout.max_prefill_tokens, **options)


def with_fewer_layers(count: int, measure: Callable[[int], Row]) -> Row:
    """Measure with so many layers; with fewer where the plan was wrong and they do not fit."""
    while True:
        try:
            return measure(count)
        except torch.OutOfMemoryError:
            if count <= 2:
                raise
        free()
        fewer = max(2, count * 3 // 4)
        common.note(f"  {count} layers are too many: {fewer}")
        count = fewer


def prompts(of: VlmShape, load: Load) -> list[Prompt]:
    """Draw a load's prompts."""
    return memory_step.prompts(of, load, 0)


def groups(drawn: Sequence[Prompt], lengths: IntArray) -> list[Group]:
    """Return groups with drawn completions of the lengths [prompts, generations], and drawn advantages."""
    rng = np.random.default_rng(0)
    out = []
    for prompt, row in zip(drawn, lengths, strict=True):
        completions = tuple(
            Completion(rng.integers(memory_step.BANNED_BELOW, 400, n), np.zeros(n, np.float32), "length", "")
            for n in row
        )
        out.append(Group(prompt, completions, (), rng.standard_normal(len(row)).astype(np.float32)))
    return out


def in_layers(made: VlmShape, whole: VlmShape) -> str:
    """Say how deep a model is."""
    count, of = made.text.num_layers, whole.text.num_layers
    return f"{count} layers" if count == of else f"{count} of {of} layers"
