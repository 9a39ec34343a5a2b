"""Attention over packed sequences: one module, whoever calls it.

Tokens of many sequences lie one after another in one row. A `Segment` says which queries see which keys, so a group
is packed as its prompt once and then its completions, each of which sees the prompt's keys and its own. The plan of a
micro-batch is made once and used by every layer. Generation passes a key/value cache in place of the plan.

On a GPU in half precision a plan goes through `models.flash`; on CPUs, and in fp32, through padded batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_vlmr1.models.flash import FlashPlan, TorchFlash
from megatron_vlmr1.models.rows import Rows, rows, take
from megatron_vlmr1.models.segments import Segment, alike
from megatron_vlmr1.runtime import device
from megatron_vlmr1.types import IntArray


class Attend(Protocol):
    """What core attention calls: softmax(q k^T / sqrt(D)) v over whatever keys the caller keeps."""

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Map q [T, H, D], k and v [T, Hkv, D] to [T, H, D]. `layer` counts from 1."""
        ...


@dataclass(frozen=True)
class _Bucket:
    """Segments of like lengths, padded to one shape: B segments, Lq queries and Lk keys each."""

    queries: Rows  # [B * Lq]
    keys: Rows  # [B * Lk]
    mask: torch.Tensor | None  # [B, 1, Lq, Lk], True where a query sees a key; None: all, or as `causal` says
    causal: bool  # every query sees the keys up to its own
    valid: torch.Tensor | None  # [n], positions within [B * Lq] that are real queries; None: all
    batch: int


class AttentionPlan:
    """Which keys each query of a packed row sees. What a device and a type need is made when they first attend."""

    def __init__(self, segments: Sequence[Segment], causal: bool = True) -> None:
        self._segments, self._causal = tuple(segments), causal

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """See `Attend`; every token must lie in exactly one segment."""
        return self._flash.attend(q, k, v) if TorchFlash.takes(q) else self._padded.attend(q, k, v)

    @cached_property
    def _flash(self) -> FlashPlan:
        return FlashPlan(self._segments, self._causal, TorchFlash())

    @cached_property
    def _padded(self) -> PaddedPlan:
        return PaddedPlan(self._segments, self._causal)


class PaddedPlan:
    """The same as a few padded batches."""

    def __init__(self, segments: Sequence[Segment], causal: bool) -> None:
        made = [_bucket(members, causal) for members in alike(segments)]
        self.buckets = [bucket for bucket, _ in made]
        order = np.concatenate([tokens for _, tokens in made]) if made else np.zeros(0, dtype=np.int64)
        self._inverse = rows(np.argsort(order))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Map q [T, H, D], k and v [T, Hkv, D] to [T, H, D]."""
        if not self.buckets:
            return q
        outputs = []
        for b in self.buckets:
            out = _grouped_attention(
                take(q, b.queries).unflatten(0, (b.batch, -1)),
                take(k, b.keys).unflatten(0, (b.batch, -1)),
                take(v, b.keys).unflatten(0, (b.batch, -1)),
                b.mask,
                b.causal,
            ).flatten(0, 1)
            outputs.append(out if b.valid is None else out.index_select(0, b.valid))
        return take(torch.cat(outputs) if len(outputs) > 1 else outputs[0], self._inverse)


def _bucket(members: list[Segment], causal: bool) -> tuple[_Bucket, IntArray]:
    """Return the bucket, and the token of each row that it puts out."""
    nq = np.array([s.stop - s.start for s in members])
    prefix = np.array([s.prefix or (0, 0) for s in members])
    np_ = prefix[:, 1] - prefix[:, 0]
    lq, lk = int(nq.max()), int((nq + np_).max())
    row_q, row_k = np.arange(lq)[None], np.arange(lk)[None]
    start = np.array([s.start for s in members])[:, None]
    queries = np.where(row_q < nq[:, None], start + row_q, start)
    own = row_k - np_[:, None]  # index among the segment's own keys
    keys = np.where(own < 0, prefix[:, :1] + row_k, start + np.minimum(own, nq[:, None] - 1))
    real = row_q < nq[:, None]
    uniform = bool(real.all())
    plain = uniform and lk == lq  # no padding and no prefix
    mask = None
    if not plain:
        seen = np.broadcast_to(own[:, None, :] < nq[:, None, None], (len(members), lq, lk))
        if causal:
            seen = seen & (own[:, None, :] <= row_q[:, :, None])
        seen = seen | ~real[:, :, None]  # a padded query sees everything: no empty softmax
        mask = None if seen.all() else torch.from_numpy(seen[:, None].copy()).to(device.device())
    bucket = _Bucket(
        queries=rows(queries.reshape(-1)),
        keys=rows(keys.reshape(-1)),
        mask=mask,
        causal=causal and plain,
        valid=None if uniform else torch.from_numpy(np.flatnonzero(real)).to(device.device()),
        batch=len(members),
    )
    return bucket, queries[real]


def repeated(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Give each query head its own copy of its key/value head: [..., Hkv, D] -> [..., heads, D]."""
    return x if x.shape[-2] == heads else x.repeat_interleave(heads // x.shape[-2], dim=-2)


def _grouped_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool
) -> torch.Tensor:
    """Attention of q [B, Lq, H, D] over k, v [B, Lk, Hkv, D] -> [B, Lq, H, D]."""
    if q.is_cuda:  # in fp32, of CUDA's kernels only the one that keeps all scores takes heads in groups
        k, v = repeated(k, q.shape[2]), repeated(v, q.shape[2])
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


@dataclass
class PackedAttention(PackedSeqParams):
    """What megatron-core hands through to core attention. Not 'thd', so that it leaves RoPE and shapes alone."""

    qkv_format: str = "sbhd"
    attend: Attend | None = None


class CoreAttention(torch.nn.Module):
    """megatron-core's slot for the attention proper; the packed parameters bring the keys and the mask."""

    def __init__(self, config: Any, layer_number: int, **_: Any) -> None:
        super().__init__()
        self.layer_number = layer_number

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        /,
        *,
        packed_seq_params: PackedAttention,
        **_: Any,
    ) -> torch.Tensor:
        """Map query [T, 1, H, D], key and value [T, 1, Hkv, D] to [T, 1, H * D]."""
        assert packed_seq_params.attend is not None
        out = packed_seq_params.attend.attend(self.layer_number, query[:, 0], key[:, 0], value[:, 0])
        return out.reshape(out.shape[0], 1, -1)
