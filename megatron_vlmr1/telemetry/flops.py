"""FLOPs of a Qwen2.5-VL forward pass, from shape numbers.

Counted are matrix products, 2 FLOPs per multiply-add, as in "Reducing Activation Recomputation in Large Transformer
Models" (arXiv 2205.05198, appendix A), with attention by (query, key) pairs so that packing, windows, shared
prompts and caches are costed as they are. Norms, activations, softmax and rotary embeddings are left out.
A backward pass costs twice its forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

# Dense matrix products in bf16, FLOP/s, by the name that CUDA gives the device (NVIDIA's data sheets).
_PEAKS = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
}
_FP8_FACTOR = 2.0  # of each of them, by the same data sheets


class LanguageShape(Protocol):
    """The language model's numbers."""

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""

    @property
    def num_layers(self) -> int:
        """Transformer layers."""

    @property
    def num_heads(self) -> int:
        """Query heads."""

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads."""

    @property
    def head_dim(self) -> int:
        """Width of a head."""

    @property
    def ffn_hidden_size(self) -> int:
        """Width of the gated feed-forward layer."""

    @property
    def vocab_size(self) -> int:
        """Rows of the output head."""


class VisionShape(Protocol):
    """The vision tower's numbers."""

    @property
    def depth(self) -> int:
        """Blocks."""

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""

    @property
    def intermediate_size(self) -> int:
        """Width of the gated feed-forward layer."""

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch: channels * temporal_patch_size * patch_size ** 2."""

    @property
    def out_hidden_size(self) -> int:
        """Width of the language model that takes the merged patches."""

    @property
    def spatial_merge_size(self) -> int:
        """Patches along one side that are merged into one token."""

    @property
    def patch_size(self) -> int:
        """Pixels along one side of a patch."""

    @property
    def window_size(self) -> int:
        """Pixels along one side of an attention window."""

    @property
    def full_attention_blocks(self) -> Sequence[int]:
        """Blocks with full attention; the others attend within windows."""


def causal_pairs(new_tokens: int, past_tokens: int = 0) -> int:
    """Return the (query, key) pairs of `new_tokens` that see `past_tokens`, themselves and their predecessors.

    A prompt of P with G completions of L that share it: ``causal_pairs(P) + G * causal_pairs(L, P)``.
    """
    return new_tokens * past_tokens + new_tokens * (new_tokens + 1) // 2


def language_flops(shape: LanguageShape, tokens: int, pairs: int, logit_tokens: int) -> int:
    """Return the FLOPs of one forward pass of the language model.

    Args:
        shape: the model's numbers.
        tokens: tokens that pass through the layers, image tokens included.
        pairs: (query, key) pairs of one layer and head, over all sequences.
        logit_tokens: tokens whose logits are computed.
    """
    attention_width = shape.num_heads * shape.head_dim
    qkv = shape.hidden_size * (attention_width + 2 * shape.num_kv_heads * shape.head_dim)
    projections = qkv + attention_width * shape.hidden_size + 3 * shape.hidden_size * shape.ffn_hidden_size
    per_layer = 2 * tokens * projections + 4 * pairs * attention_width
    return shape.num_layers * per_layer + 2 * logit_tokens * shape.hidden_size * shape.vocab_size


def vision_pairs(shape: VisionShape, grids: Sequence[tuple[int, int, int]]) -> tuple[int, int]:
    """Return the (query, key) pairs of one block and head: (in a windowed block, in a full-attention block).

    Args:
        shape: the tower's numbers.
        grids: (frames, height, width) of each image in patches. Attention never crosses frames.
    """
    # Windows hold whole tokens, so their side in patches is a multiple of the merge.
    window = shape.window_size // shape.patch_size // shape.spatial_merge_size * shape.spatial_merge_size
    windowed = full = 0
    for frames, height, width in grids:
        rows, columns = (_squares(length, window) for length in (height, width))
        windowed += frames * rows * columns
        full += frames * (height * width) ** 2
    return windowed, full


def vision_flops(shape: VisionShape, grids: Sequence[tuple[int, int, int]]) -> int:
    """Return the FLOPs of one forward pass of the vision tower, merger included.

    Args:
        shape: the tower's numbers.
        grids: (frames, height, width) of each image in patches.
    """
    patches = sum(frames * height * width for frames, height, width in grids)
    windowed, full = vision_pairs(shape, grids)
    hidden = shape.hidden_size
    full_blocks = len(set(shape.full_attention_blocks) & set(range(shape.depth)))
    blocks = shape.depth * 2 * patches * (4 * hidden**2 + 3 * hidden * shape.intermediate_size)
    attention = 4 * hidden * ((shape.depth - full_blocks) * windowed + full_blocks * full)
    merged = shape.spatial_merge_size**2
    merger = 2 * (patches // merged) * (hidden * merged) * (hidden * merged + shape.out_hidden_size)
    return 2 * patches * shape.patch_dim * hidden + blocks + attention + merger


def peak_flops(device_name: str | None, precision: str) -> float | None:
    """Return a device's FLOP/s in fp32, bf16 or fp8; None where no data sheet is known here."""
    factor = {"bf16": 1.0, "fp8": _FP8_FACTOR}.get(precision)
    peak = _PEAKS.get(device_name or "")
    return None if factor is None or peak is None else factor * peak


def utilisation(
    language: float, vision: float, seconds: float, ranks: int, peak: float | None = None
) -> dict[str, float]:
    """Return what a step made of the devices (model FLOPs utilisation: arXiv 2204.02311, appendix B).

    Args:
        language: FLOPs of the language model, all ranks; what is computed again in the backward pass not counted.
        vision: FLOPs of the tower, all ranks.
        seconds: of the step.
        ranks: devices.
        peak: FLOP/s of one device; None leaves the utilisation out.

    Returns:
        ``perf/tflops``, TFLOP/s of one device, and the fractions ``perf/mfu_lm`` and ``perf/mfu_vit`` of its peak.
    """
    each = seconds * ranks
    out = {"perf/tflops": (language + vision) / each / 1e12}
    if peak is not None:
        out |= {"perf/mfu_lm": language / each / peak, "perf/mfu_vit": vision / each / peak}
    return out


def _squares(length: int, window: int) -> int:
    """Sum of squared sizes of the windows that cut `length`; the last one may be smaller."""
    whole, rest = divmod(length, window)
    return whole * window**2 + rest**2
