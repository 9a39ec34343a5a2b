"""Memory of a rank and work of a step, counted from the config and the model's shape. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from megatron_vlmr1.config import Config, ParallelConfig, decoding_layout
from megatron_vlmr1.models import families
from megatron_vlmr1.models.pieces import OF_A_LAYER, Piece
from megatron_vlmr1.models.shape import VlmShape
from megatron_vlmr1.telemetry.flops import causal_pairs, language_flops


@dataclass(frozen=True)
class StepPlan:
    """Bytes on one rank of a pipeline stage, and the largest step that the config allows."""

    stage: int
    parameters: int
    weights_bytes: int
    gradients_bytes: int  # fp32
    optimizer_bytes: int  # this rank's share of the fp32 moments, and of the fp32 masters in bf16
    reference_bytes: int  # in host memory
    copy_bytes: int  # of weights in the decoding layout, from rollout to update; the dearest stage's
    kv_cache_bytes: int  # when rollout.max_cache_tokens are in use; the dearest stage's of a decoding layout
    step_tokens: int  # language tokens of the update, all ranks, at most
    step_flops: float  # language model, rollout and update, all ranks, at most


def plan(cfg: Config, shape: VlmShape, world: int) -> list[StepPlan]:
    """Count one rank of each pipeline stage.

    Raises:
        ValueError: the ranks or the layout do not fit.
    """
    tp, pp = cfg.parallel.tensor_model_parallel_size, cfg.parallel.pipeline_model_parallel_size
    shape.check_layout(cfg.parallel)
    cfg.recompute.check(cfg.parallel.layers_by_chunk(shape.text.num_layers))
    if world < 1 or world % (tp * pp):
        raise ValueError(f"{world} ranks are not a multiple of tensor x pipeline = {tp * pp}")
    dp, item = world // (tp * pp), 2 if cfg.precision == "bf16" else 4
    text, train = shape.text, cfg.train
    grpo = cfg.method == "grpo"
    generations = cfg.rollout.num_generations if grpo else 1
    prompt, new = cfg.data.max_prompt_tokens, cfg.rollout.max_new_tokens
    tokens = train.prompts_per_step * (prompt + generations * new)
    pairs = train.prompts_per_step * (causal_pairs(prompt) + generations * causal_pairs(new, prompt))
    forward = language_flops(text, tokens, pairs, train.prompts_per_step * generations * new)
    rounds, iterations = max(1, cfg.grpo.dynamic_sampling_rounds), cfg.grpo.num_iterations
    passes = 3 + grpo * (rounds + (cfg.grpo.beta > 0) + (iterations > 1)) + 3 * (iterations - 1)
    out = []
    decoding = decoding_layout(cfg)
    copied, cached = (0, None) if decoding is None else _decoding(shape, decoding)
    for stage in range(pp):
        layers = _layers_on_stage(cfg.parallel, text.num_layers, stage)
        parameters = _parameters(shape, tp, pp, stage, layers)
        fixed = _vision_parameters(shape) if cfg.model.freeze_vision and stage == 0 else 0
        token_numbers = _cache_numbers(shape, tp, len(layers)) if cached is None else cached
        out.append(
            StepPlan(
                stage=stage,
                parameters=parameters,
                weights_bytes=parameters * item,
                gradients_bytes=(parameters - fixed) * 4,
                optimizer_bytes=-(-(parameters - fixed) * (8 + 4 * (item == 2)) // dp),
                reference_bytes=parameters * item if grpo and cfg.grpo.beta > 0 else 0,
                copy_bytes=copied * item,
                kv_cache_bytes=cfg.rollout.max_cache_tokens * token_numbers * item,
                step_tokens=tokens,
                step_flops=float(passes * forward),
            )
        )
    return out


def lines(cfg: Config, shape: VlmShape, world: int) -> Iterator[str]:
    """Yield the plan as text, a line for each pipeline stage.

    Raises:
        ValueError: as `plan`.
    """
    tp, pp = cfg.parallel.tensor_model_parallel_size, cfg.parallel.pipeline_model_parallel_size
    stages = plan(cfg, shape, world)
    first = stages[0]
    vp = cfg.parallel.virtual_pipeline_model_parallel_size
    virtual = f" (in {vp} virtual stages)" if vp > 1 else ""
    yield f"{world} ranks: tensor {tp} x pipeline {pp}{virtual} x data {world // (tp * pp)}"
    yield f"a step: at most {first.step_tokens:,} language tokens in the update, {first.step_flops / 1e12:,.3g} TFLOP"
    for s in stages:
        copied = f"copy for generation up to {_mb(s.copy_bytes)}, " if s.copy_bytes else ""
        yield (
            f"a rank of stage {s.stage}: {s.parameters:,} parameters; weights {_mb(s.weights_bytes)}, gradients "
            f"{_mb(s.gradients_bytes)}, optimizer {_mb(s.optimizer_bytes)}, {copied}key/value cache up to "
            f"{_mb(s.kv_cache_bytes)}; reference {_mb(s.reference_bytes)} of host memory "
            "(activations and buffers not counted)"
        )


def _mb(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def _cache_numbers(shape: VlmShape, tp: int, layers: int) -> int:
    """Numbers that a token has in the key/value cache of a rank."""
    return layers * 2 * max(1, shape.text.num_kv_heads // tp) * shape.text.head_dim


def _decoding(shape: VlmShape, layout: ParallelConfig) -> tuple[int, int]:
    """Return the most parameters, and the most cached numbers of a token, of a rank in the decoding layout.

    Raises:
        ValueError: the model cannot be cut so.
    """
    shape.check_layout(layout)
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    layers = [_layers_on_stage(layout, shape.text.num_layers, stage) for stage in range(pp)]
    parameters = [_parameters(shape, tp, pp, stage, numbers) for stage, numbers in enumerate(layers)]
    return max(parameters), _cache_numbers(shape, tp, max(map(len, layers)))


def _layers_on_stage(layout: ParallelConfig, num_layers: int, stage: int) -> list[int]:
    """Numbers of the layers in all chunks of a pipeline stage."""
    sizes = layout.layers_by_chunk(num_layers)
    ends = list(accumulate(sizes))
    mine = range(stage, len(sizes), layout.pipeline_model_parallel_size)
    return [layer for chunk in mine for layer in range(ends[chunk] - sizes[chunk], ends[chunk])]


def _parameters(shape: VlmShape, tp: int, pp: int, stage: int, layers: list[int]) -> int:
    """Parameters of one rank, from the same pieces that the checkpoint reader uses."""
    sizes = families.of(shape).tensor_shapes(shape)
    names: list[tuple[str, int | None]] = []
    if stage == 0:
        names.append(("embedding.word_embeddings.weight", None))
    names += [(name, i) for i in layers for name in OF_A_LAYER]
    if stage == pp - 1:
        names.append(("decoder.final_layernorm.weight", None))
        if not shape.text.tied or pp > 1:
            names.append(("output_layer.weight", None))

    def count(piece: Piece) -> int:
        rows = piece.stop - piece.start
        if piece.name is None:
            return rows * shape.text.hidden_size  # padding of the vocabulary
        size = sizes[piece.name]
        return rows * math.prod(size) // size[piece.dim]

    text = sum(count(piece) for name, i in names for piece in families.of(shape).text_pieces(shape, name, i, 0, tp))
    return text + (_vision_parameters(shape) if stage == 0 else 0)


def _vision_parameters(shape: VlmShape) -> int:
    return sum(math.prod(size) for size in families.of(shape).vision_shapes(shape.vision).values())
