"""Every layout of a number of devices, with micro-batches, recompute and what generates: the settings of a search.

What the algorithm does (prompts, completions, the loss) stays as the config says. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from megatron_vlmr1 import config
from megatron_vlmr1.config import Config, ParallelConfig, RecomputeConfig
from megatron_vlmr1.models.shape import TextShape, padded
from megatron_vlmr1.plan.shapes import PlanShape

MICRO_BATCH_TOKENS = (4096, 8192, 16384, 32768, 65536)
VIRTUAL = (1, 2, 4)  # chunks of a stage
_UNEVEN_VIRTUAL = 2  # chunks of a stage, at most, where layers do not divide: nobody reads longer lists
RECOMPUTE = (
    {"granularity": "none"},
    {"granularity": "selective", "modules": ["core_attn"]},
    {"granularity": "selective", "modules": ["core_attn", "mlp"]},
    {"granularity": "full"},
)


@dataclass(frozen=True)
class Setting:
    """What a search varies."""

    parallel: ParallelConfig
    micro_batch_tokens: int
    recompute: RecomputeConfig
    decoding: tuple[int, int] | None  # (tensor, pipeline) of the copy that generates
    lanes: int

    def of(self, cfg: Config) -> Config:
        """Return the config with this setting; not validated again."""
        tensor, pipeline = self.decoding or (None, None)
        rollout = {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline}
        return cfg.model_copy(
            update={
                "parallel": self.parallel,
                "recompute": self.recompute,
                "train": cfg.train.model_copy(update={"micro_batch_tokens": self.micro_batch_tokens}),
                "rollout": cfg.rollout.model_copy(update=rollout),
                "data": cfg.data.model_copy(update={"lanes": self.lanes}),
            }
        )

    def overrides(self, cfg: Config) -> list[str]:
        """Return the settings that differ from the config's, as a command line takes them."""
        before, after = config.flat(cfg), config.flat(self.of(cfg))
        return [f"{key}={_word(value)}" for key, value in after.items() if before.get(key) != value]


def layouts(cfg: Config, text: TextShape, world: int, per_node: int) -> Iterator[tuple[ParallelConfig, int]]:
    """Yield (layout, data-parallel copies) that use all ranks, the tensor-parallel group within a node.

    Layers that do not divide are cut as evenly as can be, the ends of the pipeline shorter: they hold the embedding and
    the output layer as well.
    """
    for tp in _divisors(world, per_node):
        for pp in _divisors(world // tp, text.num_layers):
            for vp in VIRTUAL if pp > 1 else (1,):
                if pp * vp > text.num_layers:
                    continue
                uneven = cut(text.num_layers, pp * vp)
                if not (uneven and vp > _UNEVEN_VIRTUAL):
                    parallel = ParallelConfig(
                        tensor_model_parallel_size=tp,
                        pipeline_model_parallel_size=pp,
                        virtual_pipeline_model_parallel_size=vp,
                        pipeline_layers=uneven,
                        sequence_parallel=tp > 1,
                        timeout_s=cfg.parallel.timeout_s,
                    )
                    yield parallel, world // (tp * pp)


def cut(layers: int, chunks: int) -> list[int] | None:
    """Return the layers of each chunk where they do not divide; what is missing is missing at the ends."""
    each, rest = divmod(layers, chunks)
    if not rest:
        return None
    short = chunks - rest
    first = short // 2
    return [each] * first + [each + 1] * rest + [each] * (short - first)


def decodings(text: TextShape, parallel: ParallelConfig, per_node: int) -> Iterator[tuple[int, int] | None]:
    """Yield what may generate: the training layout itself, or copies of one or two stages in a node each."""
    yield None
    ranks, tp = parallel.ranks_of_a_copy, parallel.tensor_model_parallel_size
    if ranks == tp and parallel.pipeline_model_parallel_size == 1 and tp == 1:
        return
    for tensor, pipeline in product(_divisors(ranks, per_node), (1, 2)):
        same = (tensor, pipeline) == (tp, parallel.pipeline_model_parallel_size)
        if ranks % (tensor * pipeline) == 0 and not same and text.num_layers % pipeline == 0:
            yield tensor, pipeline


def recomputes(cfg: Config, shape: PlanShape) -> list[RecomputeConfig]:
    """Return the kinds of recomputation, with and without the tower's where it is trained."""
    towers = (False, True) if shape.vision is not None and not cfg.model.freeze_vision else (False,)
    return [RecomputeConfig(**kind, tower=tower) for kind in RECOMPUTE for tower in towers]  # type: ignore[arg-type]


def lanes(cfg: Config, copies: int) -> int:
    """Return data.lanes, or the next multiple of the data-parallel ranks."""
    return padded(cfg.data.lanes, copies)


def _divisors(n: int, most: int) -> list[int]:
    return [d for d in range(1, min(n, most) + 1) if n % d == 0]


def _word(value: object) -> str:
    """Return a value as YAML takes it in an override."""
    return json.dumps(value, separators=(",", ":")) if not isinstance(value, str) else value
