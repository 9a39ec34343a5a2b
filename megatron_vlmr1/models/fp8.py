"""What FP8 asks of layouts, micro-batches and machines. No torch: launchers and plans ask.

Transformer Engine multiplies FP8 matrices only if rows are a multiple of 8 and columns of 16 (its
`assert_dim_for_fp8_exec`). Forward, both gradients and their transposes have each side of a weight, and the tokens, as
columns once, so all of them are multiples of 16, as megatron-core's `get_fp8_align_size` has it. So are both sides of
a weight that generation multiplies, but not its tokens (torch's `_scaled_mm`). Blocks of 128 need not be full: the last
one of a side covers what is left (`Float8BlockQuantizer.get_scale_shape` rounds up, and Transformer Engine's own tests
multiply 320 x 64 by 64 x 336 in blocks).

Only what ranks gather from each other under sequence parallelism must be whole blocks (its `is_quantizable`).
"""

from __future__ import annotations

import importlib.util
from typing import Final

from megatron_vlmr1.config import Config, ParallelConfig, decoding_layout
from megatron_vlmr1.config.rules import FP8_BLOCK, FP8_MULTIPLE, token_multiple
from megatron_vlmr1.models.shape import TextShape, padded

CAPABILITY: Final = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0)}
"""Least compute capability of each recipe (Transformer Engine's `check_fp8_support` and its block-scaling twin)."""

CUDA: Final = {"delayed": (12, 1), "tensorwise": (12, 1), "blockwise": (12, 9)}
"""Least version of CUDA, from the same places."""


def asks_for_engine(cfg: Config) -> str:
    """Return what of a config needs Transformer Engine; "" for nothing."""
    if cfg.precision.fp8 != "none":
        return f"precision.fp8={cfg.precision.fp8}"
    if cfg.model.spec == "te":
        return "model.spec=te"
    moments = cfg.optimizer.moments_dtype
    return "" if moments == "fp32" else f"optimizer.moments_dtype={moments}"


def check_installed(cfg: Config) -> None:
    """Refuse what needs Transformer Engine where it is not installed; it is looked for, never imported.

    Raises:
        ValueError: one line that says what to install.
    """
    asked = asks_for_engine(cfg)
    if asked and importlib.util.find_spec("transformer_engine") is None:
        raise ValueError(
            f"{asked} needs Transformer Engine, which is not installed: on a machine with CUDA, "
            "pip install --no-build-isolation 'megatron-vlmr1[cuda]'"
        )


def check(cfg: Config, text: TextShape) -> None:
    """Refuse FP8 where matrices of a rank, micro-batches or layers do not fit it.

    Raises:
        ValueError: one line that names the key, and what fits.
    """
    fp8, parallel = cfg.precision.fp8, cfg.parallel
    if cfg.rollout.quantization == "fp8":
        decoding = decoding_layout(cfg)
        section, layout = ("parallel", parallel) if decoding is None else ("rollout", decoding)
        _check_sides("rollout.quantization=fp8", section, layout, text)
    if fp8 == "none":
        return
    _check_sides(f"precision.fp8={fp8}", "parallel", parallel, text)
    multiple = token_multiple(cfg.precision, parallel)
    if cfg.train.micro_batch_tokens < multiple:
        raise ValueError(
            f"train.micro_batch_tokens={cfg.train.micro_batch_tokens} is too small: precision.fp8={fp8} pads "
            f"micro-batches to multiples of {multiple} tokens"
        )
    most = text.num_layers // parallel.pipeline_model_parallel_size
    for key in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        if getattr(cfg.precision, key) > most:
            raise ValueError(
                f"precision.{key}={getattr(cfg.precision, key)} is more than megatron-core takes: at most the {most} "
                "layers of a pipeline stage"
            )
    if fp8 == "blockwise" and parallel.sequence_parallel and text.hidden_size % FP8_BLOCK:
        raise ValueError(
            f"precision.fp8=blockwise with parallel.sequence_parallel: the hidden size {text.hidden_size}, which ranks "
            f"gather in FP8, is not a multiple of {FP8_BLOCK}: use parallel.sequence_parallel=false"
        )


def _check_sides(asked: str, section: str, layout: ParallelConfig, text: TextShape) -> None:
    tp = layout.tensor_model_parallel_size
    if problem := misfit(text, tp):
        fitting = ", ".join(str(size) for size in tensor_sizes(text) if not misfit(text, size))
        raise ValueError(
            f"{asked} at {section}.tensor_model_parallel_size={tp}: {problem}; tensor-parallel sizes that fit: "
            f"{fitting or 'none'}"
        )


def matrices(text: TextShape, tp: int) -> dict[str, tuple[int, int]]:
    """Return (rows, columns) of each weight of a layer that is multiplied in FP8, on one tensor-parallel rank."""
    ffn = padded(text.ffn_hidden_size, tp) // tp
    heads = text.num_heads * text.head_dim
    return {
        "self_attention.linear_qkv": ((heads + 2 * text.num_kv_heads * text.head_dim) // tp, text.hidden_size),
        "self_attention.linear_proj": (text.hidden_size, heads // tp),
        "mlp.linear_fc1": (2 * ffn, text.hidden_size),
        "mlp.linear_fc2": (text.hidden_size, ffn),
    }


def misfit(text: TextShape, tp: int) -> str:
    """Return which weight of a rank cannot be multiplied in FP8, whatever the recipe; "" for none."""
    for name, (rows, columns) in matrices(text, tp).items():
        if rows % FP8_MULTIPLE or columns % FP8_MULTIPLE:
            return (
                f"{name}.weight is {rows} x {columns} on a rank, but products in FP8 take sides that are "
                f"multiples of {FP8_MULTIPLE}"
            )
    return ""


def tensor_sizes(text: TextShape) -> list[int]:
    """Return the tensor-parallel sizes that the model can be cut into, FP8 aside."""
    return [tp for tp in range(1, text.num_heads + 1) if _can_be_cut(text, tp)]


def _can_be_cut(text: TextShape, tp: int) -> bool:
    try:
        text.check_layout(ParallelConfig(tensor_model_parallel_size=tp))
    except ValueError:
        return False
    return True
