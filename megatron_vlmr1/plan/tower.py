"""What the vision tower keeps for its backward pass, and what it needs for a moment. No torch.

The tensors are those of `models.vision`. Images are shared out over the tensor-parallel group; every rank then gets
the embeddings of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vlmr1.models.shape import VisionShape
from megatron_vlmr1.plan.activations import FP32, attention, norm
from megatron_vlmr1.plan.load import Grid, unpadded, whole_images, windows


def patches(grids: Sequence[Grid]) -> int:
    """Patches of some images."""
    return sum(frames * height * width for frames, height, width in grids)


@dataclass(frozen=True)
class Tower:
    """The tower on one rank's share of some images."""

    shape: VisionShape
    grids: tuple[Grid, ...]  # of all images
    tp: int
    item: int
    flash: bool = False  # whether attention goes through `models.flash`

    @property
    def share(self) -> tuple[Grid, ...]:
        """The images of the rank that has the most; those of a plan are all of one size."""
        return self.grids[: -(-len(self.grids) // self.tp)]

    @property
    def embeddings(self) -> int:
        """Bytes of the embeddings of all images, on every rank."""
        return patches(self.grids) // self.shape.merge_unit * self.shape.out_hidden_size * self.item

    @property
    def _rows(self) -> int:
        return patches(self.share)

    @property
    def _angles(self) -> int:
        """Bytes of cosines and sines, which all blocks share, and of the angles, half as wide."""
        return self._rows * 5 * self.shape.hidden_size // self.shape.num_heads // 2 * FP32

    @property
    def _gathered(self) -> int:
        """Bytes of the gather over the tensor-parallel group: its own padded rows and every rank's."""
        if self.tp == 1:
            return 0
        return self._rows // self.shape.merge_unit * self.shape.out_hidden_size * self.item * (1 + self.tp)

    def _block(self, full: bool) -> int:
        """Bytes that a block keeps."""
        s, n = self.shape, self._rows
        d = s.hidden_size
        buckets = whole_images(self.share) if full else windows(s, self.share)
        if self.flash:
            buckets = (unpadded(n),)
        sliced = not all(b.copies_keys for b in buckets)
        # The fused row for its values, queries and keys turned in one tensor; feed-forward: gate, up, silu, product.
        own = n * ((3 * d if sliced else 0) + (2 * d if sliced else 0) + 4 * s.intermediate_size) * self.item
        ordered = n * d * self.item if len(buckets) > 1 or buckets[0].copies_queries else 0
        core = attention(buckets, 0, d, d, s.num_heads, self.item)
        return own + ordered + core + 2 * norm(n, d, self.item)

    def kept(self, recompute: bool) -> int:
        """Bytes from forward to backward of a tower that is trained."""
        s, n = self.shape, self._rows
        if not n:
            return 0
        full = len(set(s.full_attention_blocks) & set(range(s.depth)))
        blocks = full * self._block(True) + (s.depth - full) * self._block(False)
        if recompute:
            blocks = s.depth * n * s.hidden_size * self.item
        # The patches with all frames; the merger's norm, and the hidden layer before and after its GELU.
        frames = n * s.patch_dim * self.item
        merger = norm(n, s.hidden_size, self.item) + 2 * n * s.hidden_size * self.item
        return frames + blocks + merger + self._angles

    def backward(self, recompute: bool) -> int:
        """Bytes that backward needs for a moment."""
        s, n = self.shape, self._rows
        gradients = n * max(3 * s.intermediate_size, 9 * s.hidden_size) * self.item
        again = max(self._block(True), self._block(False)) if recompute and n else 0
        return gradients + again

    @property
    def forward(self) -> int:
        """Bytes of the dearest moment of a forward pass that keeps nothing, the embeddings included."""
        s, n = self.shape, self._rows
        d, wide = s.hidden_size, s.intermediate_size
        turning = n * (2 * d * self.item + 3 * d * self.item + 6 * d * FP32 + (2 * d * FP32 if self.item < FP32 else 0))
        mlp = n * (2 * d + 3 * wide) * self.item
        # An image at a time: its patches, where they are not in the host's memory and fp32, and with all frames.
        frame = patches(self.share[:1]) * s.patch_dim * self.item
        frames = frame + (frame // s.temporal_patch_size if self.item < FP32 else 0) + n * d * self.item
        return max(turning, mlp, frames) + self._angles + self._gathered
