"""What a parameter of a rank is made of: rows or columns of published tensors, one after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# What megatron-core calls the parameters of a decoder layer.
OF_A_LAYER = (
    "input_layernorm.weight",
    "self_attention.linear_qkv.weight",
    "self_attention.linear_qkv.bias",
    "self_attention.linear_proj.weight",
    "pre_mlp_layernorm.weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
)

# Transformer Engine fuses a norm with the linear layer behind it; elsewhere the two layer specs have the same names.
FUSED = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
_APART = {fused: name for name, fused in FUSED.items()}

Block = tuple[str | None, int, int]  # of a tensor (None: zeros), from, to


def spec_free(name: str) -> str:
    """Return the name of a decoder layer's parameter as in `OF_A_LAYER`, whichever layer spec it is of."""
    return _APART.get(name, name)


@dataclass(frozen=True)
class Piece:
    """Rows (dim 0) or columns (dim 1) `start`..`stop` of a Hugging Face tensor; zeros where it has no name.

    Zeros stay zeros in training: padded tokens are never labels, and a padded feed-forward unit puts out
    silu(0) * 0 = 0 through a column of zeros, so that neither its weights nor that column get a gradient.
    """

    name: str | None
    dim: int
    start: int
    stop: int


def cut(blocks: Sequence[Block], rank: int, rows: int, dim: int = 0) -> list[Piece]:
    """Cut rank's share of `rows` rows (or columns) out of the blocks laid one after another."""
    pieces, offset, first, last = [], 0, rank * rows, (rank + 1) * rows
    for name, start, stop in blocks:
        low, high = max(first, offset), min(last, offset + stop - start)
        if low < high:
            pieces.append(Piece(name, dim, start + low - offset, start + high - offset))
        offset += stop - start
    return pieces
