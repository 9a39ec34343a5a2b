"""Stand-ins for megatron-core's Transformer Engine modules, which need a GPU: the same parameters, made of torch's.

Written after `megatron/core/extensions/transformer_engine.py` of megatron-core 0.16.1 and the module classes of
Transformer Engine 2 that it inherits from: `LayerNormLinear` has `layer_norm_weight`, `weight` and `bias`, `Linear`
has `weight` and, here without one, no `bias`, `RMSNorm` has `weight`; each marks its own parallel parameters and has
`fp8_meta`.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)

from megatron_vlmr1.models.layers import RMSNorm, rms_norm
from megatron_vlmr1.runtime import device


class Scaled:
    """What all modules of Transformer Engine have that may compute in FP8, with delayed scaling."""

    fp8_meta: dict[str, Any]

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


def install(monkeypatch: Any) -> None:
    """Let the te spec be made of these."""
    from megatron.core.extensions import transformer_engine as te

    monkeypatch.setattr(te, "HAVE_TE", True)
    monkeypatch.setattr(te, "TELayerNormColumnParallelLinear", LayerNormColumnParallelLinear)
    monkeypatch.setattr(te, "TERowParallelLinear", RowParallel)
    monkeypatch.setattr(te, "TENorm", RMSNorm)
