"""The numbers that define a model, whatever family it comes from."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_vlmr1.config import ParallelConfig


def padded(size: int, parts: int) -> int:
    """Return `size` rounded up to a multiple of `parts`."""
    return -(-size // parts) * parts


@dataclass(frozen=True)
class TextShape:
    """Decoder-only language model: RMSNorm, SwiGLU, grouped-query attention with QKV bias, M-RoPE."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int
    tied: bool  # the output layer shares the embedding's weight
    norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    max_positions: int

    def check_layout(self, layout: ParallelConfig) -> None:
        """Refuse a layout that this model cannot be cut into.

        Raises:
            ValueError: naming the number that does not divide, and the nearest layouts that fit.
        """
        if problem := self._misfit(layout):
            near = "" if layout.pipeline_layers else ", ".join(f"{tp} x {pp}" for tp, pp in self._nearest(layout))
            raise ValueError(f"{problem}; nearest tensor x pipeline sizes that fit: {near}" if near else problem)

    def _misfit(self, layout: ParallelConfig) -> str:
        tp = layout.tensor_model_parallel_size
        if self.num_heads % tp:
            return (
                f"parallel.tensor_model_parallel_size={tp} does not divide the model's {self.num_heads} attention heads"
            )
        if self.num_kv_heads % tp and tp % self.num_kv_heads:
            return (
                f"parallel.tensor_model_parallel_size={tp} and the model's {self.num_kv_heads} key/value heads: "
                "one must divide the other"
            )
        rows = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        if rows % tp:
            return (
                f"parallel.tensor_model_parallel_size={tp} does not divide the model's {rows} rows of queries, keys "
                "and values"
            )
        try:
            layout.layers_by_chunk(self.num_layers)
        except ValueError as error:
            return str(error)
        return ""

    def _nearest(self, layout: ParallelConfig, count: int = 3) -> list[tuple[int, int]]:
        """Return sizes that divide heads and layers evenly, those first that are fewest times larger or smaller."""
        wanted = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
        virtual = layout.virtual_pipeline_model_parallel_size

        def times(sizes: tuple[int, int]) -> float:
            return sum(abs(math.log(a / b)) for a, b in zip(sizes, wanted, strict=True))

        fitting = [
            (tp, pp)
            for tp in range(1, self.num_heads + 1)
            for pp in range(2 if virtual > 1 else 1, self.num_layers // virtual + 1)
            if not self._misfit(
                ParallelConfig.model_construct(
                    tensor_model_parallel_size=tp,
                    pipeline_model_parallel_size=pp,
                    virtual_pipeline_model_parallel_size=virtual,
                )
            )
        ]
        return sorted(fitting, key=lambda sizes: (times(sizes), sizes))[:count]


@dataclass(frozen=True)
class VisionShape:
    """Vision tower with windowed and full attention blocks, and its merger."""

    depth: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    out_hidden_size: int
    patch_size: int
    temporal_patch_size: int
    in_channels: int
    spatial_merge_size: int
    window_size: int  # pixels
    full_attention_blocks: tuple[int, ...]

    @property
    def patch_dim(self) -> int:
        """Numbers in one flattened patch."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        """Patches that become one token."""
        return self.spatial_merge_size**2


@dataclass(frozen=True)
class VlmShape:
    """A vision-language model."""

    family: str
    text: TextShape
    vision: VisionShape
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int

    def check_layout(self, layout: ParallelConfig) -> None:
        """Refuse a layout that this model cannot be cut into.

        Raises:
            ValueError: naming the number that does not divide, and the nearest layouts that fit.
        """
        self.text.check_layout(layout)
