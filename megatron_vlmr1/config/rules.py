"""What a config and a number of ranks must have in common, whatever the model. No torch: launchers and plans ask."""

from __future__ import annotations

from megatron_vlmr1.config.precision import PrecisionConfig
from megatron_vlmr1.config.settings import Config, ParallelConfig, decoding_layout

CUDA_BURST = 8  # ticks: the host's part of each is then small, and a row that has ended idles for 4 on average
FP8_MULTIPLE = 16  # megatron-core's `get_fp8_align_size` of all three recipes
FP8_BLOCK = 128  # numbers that share a scale in `blockwise`, along each side of a weight


def token_multiple(precision: PrecisionConfig, layout: ParallelConfig) -> int:
    """Return what the tokens of a training micro-batch are padded to a multiple of.

    Under sequence parallelism each tensor-parallel rank has an equal share, and in FP8 each share, before it is
    gathered, is a multiple of `FP8_MULTIPLE`; of `FP8_BLOCK` where it is quantised in blocks, which Transformer Engine
    cannot put together from parts (it refuses that, or gathers in bf16, depending on its version).
    """
    shares = layout.tensor_model_parallel_size if layout.sequence_parallel else 1
    return shares * {"none": 1, "blockwise": FP8_BLOCK}.get(precision.fp8, FP8_MULTIPLE)


def ticks_in_a_row(given: int | None, stages: int, cuda: bool) -> int:
    """Return how many ticks of decoding follow each other without the host: `rollout.decode_burst`, or its default."""
    if stages > 1:
        return 1
    return given or (CUDA_BURST if cuda else 1)


def for_answers(cfg: Config) -> Config:
    """Return the config without what training alone computes with: layer spec, products in FP8, smaller moments."""
    changes = {
        "model": cfg.model.model_copy(update={"spec": "torch"}),
        "precision": PrecisionConfig(dtype=cfg.precision.dtype),
        "optimizer": cfg.optimizer.model_copy(update={"moments_dtype": "fp32"}),
    }
    return cfg.model_copy(update=changes)


def check_cache(cfg: Config) -> None:
    """Refuse a cache that the longest prompt would not fit: one rank would find out, in the middle of a run.

    Raises:
        ValueError: one line that names the key.
    """
    layout = decoding_layout(cfg) or cfg.parallel
    lanes = layout.pipeline_model_parallel_size if layout.virtual_pipeline_model_parallel_size == 1 else 1
    need = (cfg.data.max_prompt_tokens + cfg.rollout.max_new_tokens) * lanes
    if cfg.rollout.max_cache_tokens < need:
        each = f" on each of {lanes} pipeline stages" if lanes > 1 else ""
        raise ValueError(
            f"rollout.max_cache_tokens={cfg.rollout.max_cache_tokens} is too small: the longest prompt "
            f"(data.max_prompt_tokens={cfg.data.max_prompt_tokens}) with one completion "
            f"(rollout.max_new_tokens={cfg.rollout.max_new_tokens}){each} needs {need}"
        )


def check_shares(cfg: Config, copies: int) -> None:
    """Check that so many copies of the model, the data-parallel ranks, can share out prompts and lanes.

    Raises:
        ValueError: one line that names the key.
    """
    for key, value in (("train.prompts_per_step", cfg.train.prompts_per_step), ("data.lanes", cfg.data.lanes)):
        if value % copies:
            raise ValueError(f"{key}={value} is not a multiple of the {copies} data-parallel ranks")
