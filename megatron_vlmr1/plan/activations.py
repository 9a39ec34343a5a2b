"""What a decoder layer keeps for its backward pass, and what it needs for a moment. No torch.

The tensors are those that autograd saves in `models.layers` and megatron-core's local layer specification (0.16.1:
`transformer/attention.py`, `transformer/mlp.py`, `tensor_parallel/layers.py`), counted as they are, without fused
kernels but for attention's. Token counts: T of the packed row, and T / tp of what sequence parallelism splits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vlmr1.config import ParallelConfig, RecomputeConfig
from megatron_vlmr1.models.shape import TextShape, padded
from megatron_vlmr1.plan.counts import kv_heads
from megatron_vlmr1.plan.load import Bucket, MicroBatch

FP32, INDEX = 4, 8  # bytes


@dataclass(frozen=True)
class Widths:
    """Numbers that a token has on one rank in the tensors of a layer."""

    item: int  # bytes of a number
    hidden: int
    query: int
    key: int  # of the keys alone
    fused: int  # query, key and value as the matrix product puts them out
    whole_fused: int  # the same as it is kept: gathered where several ranks share a key/value head
    ffn: int
    heads: int
    head_dim: int
    shards: int  # of the residual stream

    @classmethod
    def of(cls, text: TextShape, layout: ParallelConfig, item: int) -> Widths:
        """Return those of a layout."""
        tp, d = layout.tensor_model_parallel_size, text.head_dim
        fused = (text.num_heads + 2 * text.num_kv_heads) * d // tp
        return cls(
            item=item,
            hidden=text.hidden_size,
            query=text.num_heads // tp * d,
            key=kv_heads(text, tp) * d,
            fused=fused,
            whole_fused=fused * (tp if text.num_kv_heads < tp else 1),
            ffn=padded(text.ffn_hidden_size, tp) // tp,
            heads=text.num_heads // tp,
            head_dim=d,
            shards=tp if layout.sequence_parallel else 1,
        )


def norm(rows: int, width: int, item: int) -> int:
    """Bytes that RMSNorm keeps: its input in fp32 and 1 / rms, the normed rows, and their product with the weight."""
    return rows * (width * (FP32 + 2 * item) + FP32)


def attention(buckets: Sequence[Bucket], tokens: int, query: int, key: int, heads: int, item: int) -> int:
    """Bytes that scaled dot-product attention keeps beside the fused row that holds the values.

    Queries and keys (and copies of both and of values, where a batch is not a slice of the row), the mask in the type
    of activations (`convert_boolean_attn_mask`), the output and the log-sum-exp of every row. No scores: the fused
    kernels of CPUs and GPUs compute them again. `models.flash` keeps just so much of one bucket (`load.unpadded`).
    """
    total = 0
    if not all(b.copies_queries for b in buckets):
        total += tokens * query
    if not all(b.copies_keys for b in buckets):
        total += tokens * key
    for b in buckets:
        total += b.query_rows * query * (2 if b.copies_queries else 1) + b.mask
        total += b.key_rows * 2 * key if b.copies_keys else 0
    return total * item + sum(b.query_rows for b in buckets) * heads * FP32


@dataclass(frozen=True)
class Layer:
    """A decoder layer on one micro-batch."""

    widths: Widths
    batch: MicroBatch

    @property
    def rows(self) -> int:
        """Rows of the residual stream on this rank."""
        return self.batch.tokens // self.widths.shards

    @property
    def input(self) -> int:
        """Bytes of the layer's input, and of its output."""
        return self.rows * self.widths.hidden * self.widths.item

    @property
    def norms(self) -> int:
        """Bytes that both norms keep."""
        return 2 * norm(self.rows, self.widths.hidden, self.widths.item)

    @property
    def core(self) -> int:
        """Bytes that attention proper keeps, but for what the rest of the layer keeps as well."""
        w, batch = self.widths, self.batch
        return attention(batch.buckets, batch.tokens, w.query, w.key, w.heads, w.item)

    @property
    def around(self) -> int:
        """Bytes kept around attention proper.

        The fused row, in which the values lie; cosines and sines for queries and for keys; and attention's output in
        order, which is a copy where it comes out in several batches.
        """
        w, t = self.widths, self.batch.tokens
        sliced = not all(b.copies_keys for b in self.batch.buckets)
        ordered = t * w.query if len(self.batch.buckets) > 1 else 0
        return (t * (w.whole_fused * sliced + 4 * w.head_dim) + ordered) * w.item

    @property
    def mlp(self) -> int:
        """Bytes that the feed-forward layer keeps: gate and up together, up + 0, silu(gate), and the product.

        megatron-core adds `glu_linear_offset`, which is 0, to the upper half, and so keeps it twice.
        """
        return 5 * self.batch.tokens * self.widths.ffn * self.widths.item

    def kept(self, recompute: RecomputeConfig) -> int:
        """Bytes from forward to backward of a layer that is not recomputed as a whole."""
        if recompute.granularity != "selective":
            return self.norms + self.around + self.core + self.mlp
        modules = recompute.modules or ["core_attn"]
        w, t = self.widths, self.batch.tokens
        # Of attention proper its queries and keys (the values lie in the fused row), and its output where that is not
        # kept in another order anyway.
        ends = w.query + w.key + (w.query if len(self.batch.buckets) == 1 else 0)
        core = t * ends * w.item if "core_attn" in modules else self.core
        return self.norms + self.around + core + (0 if "mlp" in modules else self.mlp)

    @property
    def backward(self) -> int:
        """Bytes of gradients at the dearest moment of backward, less what has been given back until then."""
        w, t = self.widths, self.batch.tokens
        matrix = w.ffn * w.hidden * w.item
        out = t * w.hidden * w.item
        wide = t * w.ffn * w.item
        copied = sum(b.query_rows * 2 * w.query + b.key_rows * 2 * w.key for b in self.batch.buckets) * w.item
        return max(
            out + wide + matrix,  # of the second matrix product: its input's and its weight's
            out + 2 * wide,  # of the product of gate and up, both; what was kept of the product itself is gone
            2 * out - 2 * wide + 2 * matrix,  # of the first matrix product
            2 * out - self.mlp + copied,  # of attention
        )

    @property
    def forward(self) -> int:
        """Bytes of the dearest moment of a forward pass that keeps nothing.

        The residual stream is there as it came in, with attention's output, and normed.
        """
        w, t = self.widths, self.batch.tokens
        gathered = t * w.hidden * w.item if w.shards > 1 else 0
        mlp = self.mlp
        copies = sum(
            b.query_rows * w.query * (2 if b.copies_queries else 1) + b.key_rows * 2 * w.key * b.copies_keys + b.mask
            for b in self.batch.buckets
        )
        attention = t * (w.whole_fused + w.query + w.key) * w.item + copies * w.item
        turning = t * (w.whole_fused + w.key + 4 * w.query) * w.item
        return 3 * self.input + gathered + max(mlp, attention, turning)

    @property
    def plan(self) -> int:
        """Bytes of the attention plan: numbers of rows, and masks of one byte."""
        rows = sum(b.query_rows * b.copies_queries + b.key_rows * b.copies_keys for b in self.batch.buckets)
        return rows * INDEX + sum(b.mask for b in self.batch.buckets)


def chunk_kept(layer: Layer, layers: int, recompute: RecomputeConfig) -> tuple[int, int]:
    """Return bytes that a chunk of layers keeps for a micro-batch, and those that backward adds to compute again.

    Whole layers behind recomputed ones (`method` block) have given back what they kept when these are computed again.
    """
    full = layer.kept(RecomputeConfig())
    if recompute.granularity != "full":
        kept = layer.kept(recompute)
        return layers * kept, full - kept if layers else 0
    unit = recompute.num_layers or 1
    if recompute.method != "block":
        return layers // unit * layer.input, unit * full if layers else 0
    units = min(unit, layers)
    whole = (layers - units) * full
    return units * layer.input + whole, max(0, full - whole) if units else 0
