"""megatron-core's configuration for our models, and their norm."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlmr1.config import PrecisionConfig, RecomputeConfig
from megatron_vlmr1.models.shape import TextShape, padded
from megatron_vlmr1.parallel.mesh import Mesh
from megatron_vlmr1.runtime import device


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm, computed in fp32; its weight is marked for sequence parallelism.

    megatron-core's local specification refuses sequence parallelism with torch's own norm.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device.device()))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension of x."""
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return weight * x / sqrt(mean(x^2) + eps), the normalisation in fp32, as the published models compute it."""
    return weight * F.rms_norm(x.float(), (x.shape[-1],), None, eps).to(x.dtype)


def transformer_config(
    text: TextShape,
    mesh: Mesh,
    dtype: torch.dtype,
    recompute: RecomputeConfig,
    precision: PrecisionConfig | None = None,
    spec: Literal["torch", "te"] = "torch",
) -> TransformerConfig:
    """Return megatron-core's configuration of the language model on this mesh.

    Of `precision` only what is about FP8 is read; None computes none. `spec` is that of the layers, as in
    `models.specs`: with Transformer Engine's modules go fused kernels.

    Raises:
        ValueError: this megatron-core has no such FP8 option.
    """
    interleaved = mesh.vp_size > 1
    return TransformerConfig(
        num_layers=text.num_layers,
        hidden_size=text.hidden_size,
        num_attention_heads=text.num_heads,
        num_query_groups=text.num_kv_heads,
        kv_channels=text.head_dim,
        ffn_hidden_size=padded(text.ffn_hidden_size, mesh.tp_size),
        normalization="RMSNorm",
        layernorm_epsilon=text.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        mrope_section=list(text.mrope_section),
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=mesh.tp_size,
        pipeline_model_parallel_size=mesh.pp_size,
        virtual_pipeline_model_parallel_size=mesh.vp_size if interleaved else None,
        pipeline_model_parallel_layout=_layer_layout(mesh.layout.layers_by_chunk(text.num_layers)),
        # Two interleaved stages are each other's previous and next: only sends of separate calls keep their order.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        sequence_parallel=mesh.sequence_parallel,
        use_cpu_initialization=device.device().type != "cuda",
        perform_initialization=False,  # weights always come from a checkpoint
        calculate_per_token_loss=True,  # losses arrive normalised: the schedule must not scale them
        variable_seq_lengths=True,  # packed micro-batches differ in length
        moe_token_dispatcher_type="alltoall",  # megatron-core asks for it with variable_seq_lengths
        # It would be the output layer's as well, which asks for apex then; `parallel.optimizer.wrap` sets the others'.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=spec == "te",  # silu(gate) * up: one kernel forward, one backward
        bias_dropout_fusion=False,
        apply_rope_fusion=spec == "te",
        deallocate_pipeline_outputs=False,
        **recompute.megatron_core(),
        **_fp8(precision or PrecisionConfig()),
    )


def _fp8(precision: PrecisionConfig) -> dict[str, Any]:
    """Return FP8 options, all of which this version of megatron-core has."""
    options = precision.megatron_core()
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    if missing := sorted(options.keys() - known):
        raise ValueError(f"precision.fp8={precision.fp8}: this megatron-core has no {', '.join(missing)}")
    return options


def _layer_layout(layers_by_chunk: Sequence[int]) -> list[list[str]]:
    """Return what megatron-core calls the pipeline layout: the kinds of layers of each chunk."""
    layout = [["decoder"] * n for n in layers_by_chunk]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return layout
