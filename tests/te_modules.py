"""Stand-ins for megatron-core's Transformer Engine modules, which need a GPU: the same parameters, made of torch's.

Written after `megatron/core/extensions/transformer_engine.py` of megatron-core 0.16.1 and the module classes of
Transformer Engine 2 that it inherits from: `LayerNormLinear` has `layer_norm_weight`, `weight` and `bias`, `Linear`
has `weight` and, here without one, no `bias`, `RMSNorm` has `weight`; each marks its own parallel parameters and has
`fp8_meta`, and adds its weight's gradient to `main_grad` while `fuse_wgrad_accumulation` is set.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.fusions import fused_bias_swiglu
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel import layers as parallel_layers

from megatron_vlmr1.models.layers import RMSNorm, rms_norm
from megatron_vlmr1.runtime import device


class Scaled:
    """What all modules of Transformer Engine have that may compute in FP8, with delayed scaling."""

    fp8_meta: dict[str, Any]
    gradient_accumulation_fusion: bool  # megatron-core's name for its own layers, from which these inherit

    @property
    def fuse_wgrad_accumulation(self) -> bool:
        return self.gradient_accumulation_fusion

    @fuse_wgrad_accumulation.setter
    def fuse_wgrad_accumulation(self, value: bool) -> None:
        self.gradient_accumulation_fusion = value

    def init_fp8_meta_tensors(self, recipe: Any) -> None:
        """Make the state of both directions: 3 tensors a product forward, 2 backward."""
        for direction, tensors in (("scaling_fwd", 3), ("scaling_bwd", 2)):
            n = self.fp8_meta["num_gemms"] * tensors
            self.fp8_meta[direction] = SimpleNamespace(
                scale=torch.ones(n), amax_history=torch.zeros(recipe.amax_history_len, n)
            )


class LayerNormColumnParallelLinear(Scaled, ColumnParallelLinear):
    def __init__(self, input_size: int, output_size: int, *, config: Any, **rest: Any) -> None:
        super().__init__(input_size, output_size, config=config, **rest)
        self.layer_norm_weight = torch.nn.Parameter(
            torch.ones(input_size, dtype=config.params_dtype, device=device.device())
        )
        self.layer_norm_weight.sequence_parallel = config.sequence_parallel
        if not hasattr(self.weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(self.weight, True, 0, 1)
        self.eps, self.fp8_meta = config.layernorm_epsilon, {}

    def forward(self, x: torch.Tensor, *rest: Any) -> Any:
        return super().forward(rms_norm(x, self.layer_norm_weight, self.eps), *rest)


class RowParallel(Scaled, RowParallelLinear):
    def __init__(self, *sizes: int, **rest: Any) -> None:
        super().__init__(*sizes, **rest)
        if not hasattr(self.weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(self.weight, True, 1, 1)
        self.fp8_meta = {}


def turned(t: torch.Tensor, freqs: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """Turn t [T, 1, H, D] by angles [T, 1, 1, D], as Transformer Engine's kernel does: in fp32, rounded once."""
    assert not interleaved and freqs.dtype == torch.float32 and freqs.shape == (t.shape[0], 1, 1, t.shape[3])
    first, second = t.float().chunk(2, -1)
    return (t.float() * freqs.cos() + torch.cat((-second, first), -1) * freqs.sin()).to(t.dtype)


def _accumulate(x: torch.Tensor, gradient: torch.Tensor, main_grad: torch.Tensor) -> None:
    main_grad.addmm_(gradient.t().to(main_grad.dtype), x.to(main_grad.dtype))


def install(monkeypatch: Any) -> None:
    """Let the te spec be made of these."""
    from megatron.core.extensions import transformer_engine as te

    monkeypatch.setattr(te, "HAVE_TE", True)
    monkeypatch.setattr(te, "TELayerNormColumnParallelLinear", LayerNormColumnParallelLinear)
    monkeypatch.setattr(te, "TERowParallelLinear", RowParallel)
    monkeypatch.setattr(te, "TENorm", RMSNorm)
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", turned)
    for name in ("swiglu", "swiglu_back"):  # compiled, where megatron-core was imported before it was prepared
        function = getattr(fused_bias_swiglu, name)
        monkeypatch.setattr(fused_bias_swiglu, name, getattr(function, "_torchdynamo_orig_callable", function))
    kernel = SimpleNamespace(wgrad_gemm_accum_fp32=_accumulate)
    monkeypatch.setattr(parallel_layers, "fused_weight_gradient_mlp_cuda", kernel, raising=False)
