"""A lean forward pass over the training weights: what generation runs instead of megatron-core's modules.

The same arithmetic as the training forward (tests pin the two to each other) on rows [T, hidden] without a batch
dimension, without autograd and without sequence parallelism: while decoding, Python around the kernels would cost more
than the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_vlmr1.models.pieces import OF_A_LAYER, spec_free
from megatron_vlmr1.models.policy import Policy
from megatron_vlmr1.models.shape import TextShape
from megatron_vlmr1.parallel.mesh import Mesh
from megatron_vlmr1.rollout.quantised import QuantisedWeight, QuantisedWeights, linear, tensors
from megatron_vlmr1.runtime import device
from megatron_vlmr1.types import ImagePatches


class Rotation(NamedTuple):
    """Rotary factors of the fused rows [q..q k v] of a key/value group: x -> x * cos + swap_halves(x) * sin.

    Values are not turned: their factors are 1 and 0.
    """

    cos: torch.Tensor  # [T, 1, q..q k v, D]
    sin: torch.Tensor  # the same; its first half is negated


class FusedAttend(Protocol):
    """What attention calls while generating."""

    def attend(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        """Map turned qkv [T, Hkv, q..q k v, D] to [T, H, D]. `layer` counts from 0 over this rank's layers."""
        ...


_Matrix = torch.Tensor | QuantisedWeight


@dataclass(frozen=True)
class _Layer:
    """Weights of one layer on this rank, as megatron-core lays them out; in the order of `OF_A_LAYER`."""

    norm: torch.Tensor  # [hidden]
    qkv: _Matrix  # [(H + 2 Hkv) D / tp, hidden], rows q..q k v of each key/value group
    qkv_bias: torch.Tensor
    out: _Matrix  # [hidden, H D / tp]
    mlp_norm: torch.Tensor  # [hidden]
    gate_up: _Matrix  # [2 ffn / tp, hidden]
    down: _Matrix  # [hidden, ffn / tp]


def _layer(module: Any) -> _Layer:
    held = {spec_free(name): parameter for name, parameter in module.named_parameters()}
    return _Layer(*(held[name] for name in OF_A_LAYER))


class Forward:
    """This rank's part of the model, chunk by chunk (one chunk per virtual pipeline stage)."""

    def __init__(self, policy: Policy, positions: int, quantised: QuantisedWeights | None = None) -> None:
        """Refer to the policy's parameters, and to the copies of matrices that stand in for them, if there are any.

        Completions have positions below `positions`.
        """
        self.policy, self.positions = policy, positions
        self.mesh: Mesh = policy.mesh
        self.text: TextShape = policy.shape.text
        self.chunks = [[_layer(module) for module in chunk.language.decoder.layers] for chunk in policy.chunks]
        self.quantised = quantised
        if quantised is not None:
            pairs = zip(self.chunks, quantised.refresh(), strict=True)
            self.chunks = [[replace(a, **b._asdict()) for a, b in zip(*pair, strict=True)] for pair in pairs]
        self.layers = sum(map(len, self.chunks))
        # With fewer key/value heads than ranks, several ranks share one: megatron-core splits the fused rows evenly.
        self.kv_heads = max(1, self.text.num_kv_heads // self.mesh.tp_size)
        self.heads = self.text.num_heads // self.mesh.tp_size
        self._eps = torch.tensor(self.text.norm_eps, device=device.device())
        self._frequencies = _frequencies(self.text).to(device.device())
        everywhere = torch.arange(positions, device=device.device()).expand(3, -1)
        self._text = self.rotation(everywhere, query_scale=self.text.head_dim**-0.5)

    def addresses(self) -> tuple[int, ...]:
        """Return where the weights lie that a token meets on its way to its logits; for a model of one stage."""
        model = self.policy.model
        held = [getattr(layer, field.name) for layer in self.chunks[0] for field in fields(layer)]
        read = [tensor for weight in held for tensor in tensors(weight)]
        ends = model.language.embedding.word_embeddings.weight, model.language.decoder.final_layernorm.weight
        return tuple(weight.data_ptr() for weight in (*read, *ends, self.policy.output_weight()))

    def rotation(self, positions: torch.Tensor, query_scale: float = 1.0) -> Rotation:
        """Return the factors at M-RoPE positions [3, T], those of queries times a scale; in the type of activations."""
        angles = (positions.t()[:, :, None].float() * self._frequencies).sum(1)  # [T, D / 2]
        cos, sin = angles.cos(), angles.sin()
        cos, sin = (torch.cat(pair, -1)[:, None] for pair in ((cos, cos), (-sin, sin)))  # [T, 1, D]
        queries = (-1, self.heads // self.kv_heads, -1)
        dtype = self.policy.chunks[0].dtype
        return Rotation(
            torch.cat(((cos * query_scale).expand(queries), cos, torch.ones_like(cos)), 1).to(dtype)[:, None],
            torch.cat(((sin * query_scale).expand(queries), sin, torch.zeros_like(sin)), 1).to(dtype)[:, None],
        )

    def rotation_of_text(self, positions: torch.Tensor) -> Rotation:
        """Return the factors at positions [n] of text, whose three rows are alike; queries are divided by sqrt(D)."""
        return Rotation(*(table.index_select(0, positions) for table in self._text))

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Return embeddings [T, hidden] of token ids [T]; first stage only."""
        table = self.policy.chunks[0].language.embedding.word_embeddings.weight
        if self.mesh.tp_size == 1:
            return F.embedding(token_ids, table)
        local = token_ids - self.mesh.tp_rank * table.shape[0]
        owned = (local >= 0) & (local < table.shape[0])
        x = F.embedding(local.clamp(0, table.shape[0] - 1), table) * owned[:, None]
        return self._summed(x)

    def embed_images(
        self, x: torch.Tensor, images: Sequence[ImagePatches], order: Sequence[int], rows: torch.Tensor
    ) -> torch.Tensor:
        """Put the embeddings of unique images, repeated in `order`, at `rows` of x; first stage only."""
        features = self.policy.features(images)
        assert features is not None
        return x.index_copy(0, rows, torch.cat([features[i] for i in order]).to(x.dtype))

    def run(self, chunk: int, x: torch.Tensor, rotation: Rotation, attend: FusedAttend) -> torch.Tensor:
        """Map x [T, hidden] through the layers of a chunk; the last one's output is normed."""
        first = sum(map(len, self.chunks[:chunk]))
        for number, layer in enumerate(self.chunks[chunk], first):
            qkv = self._own_heads(linear(self._normed(x, layer.norm), layer.qkv, layer.qkv_bias))
            qkv = torch.addcmul(qkv * rotation.cos, qkv.roll(self.text.head_dim // 2, -1), rotation.sin)
            x = self._add(x, attend.attend(number, qkv).flatten(1), layer.out)
            gate, up = linear(self._normed(x, layer.mlp_norm), layer.gate_up).chunk(2, -1)
            x = self._add(x, F.silu(gate) * up, layer.down)
        model = self.policy.chunks[chunk]
        return self._normed(x, model.language.decoder.final_layernorm.weight) if model.post_process else x

    def _normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return `models.layers.rms_norm`, in half its kernels where there are no gradients.

        On CUDA torch has one kernel, which rounds once, behind the weight, as Transformer Engine's does.
        """
        if x.is_cuda:
            return F.rms_norm(x, weight.shape, weight, self.text.norm_eps)
        norm = torch.linalg.vector_norm(x, 2, -1, True, dtype=torch.float32)
        scale = torch.addcmul(self._eps, norm, norm, value=1.0 / x.shape[1]).rsqrt_()
        return (x * scale).type_as(x).mul_(weight)

    def _own_heads(self, qkv: torch.Tensor) -> torch.Tensor:
        """Return this rank's heads [T, Hkv, q..q k v, D] of its fused rows."""
        groups, tp = self.text.num_kv_heads, self.mesh.tp_size
        if groups >= tp:
            return qkv.view(qkv.shape[0], self.kv_heads, -1, self.text.head_dim)
        parts = [torch.empty_like(qkv) for _ in range(tp)]
        dist.all_gather(parts, qkv, group=self.mesh.tp_group)
        sharing = tp // groups  # ranks that share a group; each has its own part of the query heads
        whole = torch.cat(parts, -1).unflatten(-1, (groups, -1, self.text.head_dim))
        group = whole[:, self.mesh.tp_rank // sharing]
        start = self.heads * (self.mesh.tp_rank % sharing)
        return torch.cat((group[:, start : start + self.heads], group[:, -2:]), 1)[:, None]

    def _add(self, x: torch.Tensor, y: torch.Tensor, weight: _Matrix) -> torch.Tensor:
        """Return x + y weight^T, summed over the tensor-parallel group's parts of y."""
        if self.mesh.tp_size == 1 and isinstance(weight, torch.Tensor):
            return torch.addmm(x, y, weight.t())
        return x + self._summed(linear(y, weight))

    def _summed(self, x: torch.Tensor) -> torch.Tensor:
        if self.mesh.tp_size > 1:
            dist.all_reduce(x, group=self.mesh.tp_group)
        return x


def _frequencies(text: TextShape) -> torch.Tensor:
    """Return [3, D / 2]: what each of the three positions turns each pair by, in sections (arXiv 2409.12191)."""
    half = text.head_dim // 2
    inverse = 1.0 / text.rope_theta ** (torch.arange(0, text.head_dim, 2, dtype=torch.float32) / text.head_dim)
    row = torch.repeat_interleave(torch.arange(3), torch.tensor(text.mrope_section))
    out = torch.zeros(3, half)
    out[row, torch.arange(half)] = inverse
    return out
