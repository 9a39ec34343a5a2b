"""Layer specs: which modules the language model's layers are made of.

`torch` are megatron-core's own modules with our norm, for CPUs and where Transformer Engine is not there; `te` are
Transformer Engine's, a norm fused with the linear layer behind it. Core attention is ours in both: it alone knows
groups that share a prompt, and the cache of generation.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_vlmr1.config import Config, PrecisionConfig
from megatron_vlmr1.models.attention import CoreAttention
from megatron_vlmr1.models.fp8 import CAPABILITY, CUDA, asks_for_engine, check_installed
from megatron_vlmr1.models.layers import RMSNorm
from megatron_vlmr1.runtime import device


@dataclass(frozen=True)
class Layers:
    """What the language model's layers are made of, and which of their products are in FP8."""

    spec: Literal["torch", "te"] = "torch"
    precision: PrecisionConfig = PrecisionConfig()


def layers(cfg: Config) -> Layers:
    """Choose what the config asks for and this rank's device has.

    Raises:
        ValueError: Transformer Engine, CUDA or the GPU's capability is missing; one line.
    """
    check_installed(cfg)
    spec, fp8 = cfg.model.spec, cfg.precision.fp8
    usable = device.has_cuda() and importlib.util.find_spec("transformer_engine") is not None
    if (asked := asks_for_engine(cfg)) and not device.has_cuda():
        raise ValueError(f"{asked}: Transformer Engine needs a GPU, and this rank has no CUDA")
    if fp8 != "none" and (found := device.capability()) < CAPABILITY[fp8]:
        have, need = (".".join(map(str, pair)) for pair in (found, CAPABILITY[fp8]))
        raise ValueError(
            f"precision.fp8={fp8} needs a GPU of compute capability {need} (Hopper is 9.0), but "
            f"{device.name()} has {have}: use precision.fp8=none"
        )
    if fp8 != "none" and (built := device.cuda_version()) < CUDA[fp8]:
        have, need = (".".join(map(str, pair)) for pair in (built, CUDA[fp8]))
        raise ValueError(f"precision.fp8={fp8} needs CUDA {need}, but torch is built for {have}: install a newer torch")
    return Layers("te" if usable and spec != "torch" else "torch", cfg.precision)


def block_spec(number: int, spec: Literal["torch", "te"]) -> TransformerBlockSubmodules:
    """Return the specification of a chunk's transformer block of so many layers.

    Raises:
        ValueError: megatron-core cannot import what it wants of Transformer Engine; one line.
    """
    layer: ModuleSpec = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.self_attention.submodules.core_attention = CoreAttention
    norm: Any = RMSNorm
    if spec == "te":
        norm = _fuse(layer.submodules)
    else:
        layer.submodules.input_layernorm = RMSNorm
        layer.submodules.pre_mlp_layernorm = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * number, layer_norm=norm)


def _fuse(layer: Any) -> type[torch.nn.Module]:
    """Put Transformer Engine's modules into a layer's specification; return its norm for the end.

    Raises:
        ValueError: megatron-core cannot import what it wants of Transformer Engine; one line.
    """
    # Not at the top: where there is CUDA and it is installed, this imports Transformer Engine.
    from megatron.core.extensions import transformer_engine as te

    if not te.HAVE_TE:
        raise ValueError(
            "megatron-core cannot use the Transformer Engine that is installed (python -c 'import transformer_engine."
            "pytorch' may say why): install another version of it, or use model.spec=torch without FP8"
        )
    layer.input_layernorm = layer.pre_mlp_layernorm = IdentityOp
    attention, mlp = _submodules(layer.self_attention), _submodules(layer.mlp)
    attention.linear_qkv = mlp.linear_fc1 = te.TELayerNormColumnParallelLinear
    attention.linear_proj = mlp.linear_fc2 = te.TERowParallelLinear
    layer.sharded_state_dict_keys_map = {}  # the names are those that it would have turned them into
    return te.TENorm  # type: ignore[no-any-return]


def _submodules(part: ModuleSpec | partial[Any]) -> Any:
    """Return what a part of a layer is made of; newer megatron-core has functions in place of some specifications."""
    return part.keywords["submodules"] if isinstance(part, partial) else part.submodules
