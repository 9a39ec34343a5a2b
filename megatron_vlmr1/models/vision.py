"""Vision tower of Qwen2.5-VL: windowed and full attention, 2-D RoPE, merger.

The tower is replicated over the tensor-parallel group, and the images of a micro-batch are shared out over it
(`encode`). Parameter names are the published ones without their ``visual.`` prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from torch.utils.checkpoint import checkpoint

from megatron_vlmr1.models.attention import AttentionPlan
from megatron_vlmr1.models.layers import rms_norm
from megatron_vlmr1.models.segments import Segment
from megatron_vlmr1.models.shape import VisionShape
from megatron_vlmr1.parallel.mesh import Mesh
from megatron_vlmr1.runtime import device
from megatron_vlmr1.types import ImagePatches, IntArray

Grid = tuple[int, int, int]  # frames, patch rows, patch columns
_EPS = 1e-6


@dataclass(frozen=True)
class _Layout:
    """Where the patches of one image go."""

    order: IntArray  # [units], merge units in window order
    windows: IntArray  # [windows], patches in each window
    positions: IntArray  # [patches, 2], row and column of each patch, in Hugging Face patch order


@lru_cache(maxsize=4096)
def _layout(grid: Grid, merge: int, window: int) -> _Layout:
    """Windows are `window` x `window` merge units, cut from the top left; the last ones may be smaller."""
    t, h, w = grid
    rows, columns = h // merge, w // merge
    units = np.arange(rows * columns).reshape(rows, columns)
    order, windows = [], []
    for frame in range(t):
        for top in range(0, rows, window):
            for left in range(0, columns, window):
                cell = units[top : top + window, left : left + window].reshape(-1)
                order.append(cell + frame * rows * columns)
                windows.append(cell.size * merge * merge)
    row, column = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")
    blocks = [p.reshape(rows, merge, columns, merge).transpose(0, 2, 1, 3).reshape(-1) for p in (row, column)]
    return _Layout(np.concatenate(order), np.array(windows), np.tile(np.stack(blocks, 1), (t, 1)))


def _segments(lengths: Sequence[int]) -> list[Segment]:
    ends = np.cumsum(lengths).tolist()
    return [Segment(end - n, end) for n, end in zip(lengths, ends, strict=True)]


class _Attention(torch.nn.Module):
    def __init__(self, shape: VisionShape, **kw: Any) -> None:
        super().__init__()
        self.heads = shape.num_heads
        self.qkv = torch.nn.Linear(shape.hidden_size, 3 * shape.hidden_size, **kw)
        self.proj = torch.nn.Linear(shape.hidden_size, shape.hidden_size, **kw)

    def forward(self, x: torch.Tensor, plan: AttentionPlan, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(x).view(x.shape[0], 3, self.heads, -1)  # [N, 3, heads, D]
        q, k = _rotate(qkv[:, :2], cos, sin).unbind(1)
        return self.proj(plan.attend(0, q, k, qkv[:, 2]).reshape(x.shape))


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (i, i + D / 2) of x [..., D]. The first half of `sin` is negated."""
    y = x.float()
    return torch.addcmul(y * cos, y.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


class _Mlp(torch.nn.Module):
    def __init__(self, shape: VisionShape, **kw: Any) -> None:
        super().__init__()
        self.gate_proj = torch.nn.Linear(shape.hidden_size, shape.intermediate_size, **kw)
        self.up_proj = torch.nn.Linear(shape.hidden_size, shape.intermediate_size, **kw)
        self.down_proj = torch.nn.Linear(shape.intermediate_size, shape.hidden_size, **kw)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class _Norm(torch.nn.Module):
    def __init__(self, size: int, **kw: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(size, **kw))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, _EPS)


class _Block(torch.nn.Module):
    def __init__(self, shape: VisionShape, **kw: Any) -> None:
        super().__init__()
        self.norm1 = _Norm(shape.hidden_size, **kw)
        self.norm2 = _Norm(shape.hidden_size, **kw)
        self.attn = _Attention(shape, **kw)
        self.mlp = _Mlp(shape, **kw)

    def forward(self, x: torch.Tensor, plan: AttentionPlan, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x), plan, cos, sin)
        return x + self.mlp(self.norm2(x))


class _Weight(torch.nn.Module):
    def __init__(self, *size: int, **kw: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(*size, **kw))


class _PatchEmbed(torch.nn.Module):
    def __init__(self, shape: VisionShape, **kw: Any) -> None:
        super().__init__()
        size = (shape.in_channels, shape.temporal_patch_size, shape.patch_size, shape.patch_size)
        self.proj = _Weight(shape.hidden_size, *size, **kw)

    def forward(self, patches: Sequence[torch.Tensor]) -> torch.Tensor:
        # The published convolution has kernel = stride = the patch: a matrix product on flattened patches. They are
        # many times larger than what comes out, so that they are not brought together first.
        weight = self.proj.weight.flatten(1)
        return torch.cat([F.linear(self._all_frames(x.to(weight.device, weight.dtype)), weight) for x in patches])

    def _all_frames(self, x: torch.Tensor) -> torch.Tensor:
        frames = self.proj.weight.shape[2]
        return x if x.dim() == 2 else x[:, :, None].expand(-1, -1, frames, -1).flatten(1)


class _Merger(torch.nn.Module):
    def __init__(self, shape: VisionShape, **kw: Any) -> None:
        super().__init__()
        merged = shape.hidden_size * shape.merge_unit
        self.ln_q = _Norm(shape.hidden_size, **kw)
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(merged, merged, **kw), torch.nn.GELU(), torch.nn.Linear(merged, shape.out_hidden_size, **kw)
        )
        self.merged = merged

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.ln_q(x).view(-1, self.merged))


class VisionTower(MegatronModule):
    """Patches of images to embeddings of image tokens."""

    def __init__(self, config: Any, shape: VisionShape, dtype: torch.dtype, recompute: bool = False) -> None:
        """`recompute`: keep only each block's input for backward, and compute the rest again."""
        super().__init__(config=config)
        self.recompute = recompute
        kw: dict[str, Any] = {"dtype": dtype, "device": device.device()}
        self.shape = shape
        self.patch_embed = _PatchEmbed(shape, **kw)
        self.blocks = torch.nn.ModuleList(_Block(shape, **kw) for _ in range(shape.depth))
        self.merger = _Merger(shape, **kw)
        self.window = shape.window_size // shape.patch_size // shape.spatial_merge_size
        for parameter in self.parameters():
            parameter.sum_gradients_across_tp = True  # type: ignore[attr-defined]  # each rank saw its own images

    def forward(self, patches: Sequence[torch.Tensor], grids: Sequence[Grid]) -> torch.Tensor:
        """Map each image's patches to [N / merge_unit, out_hidden], one image after another.

        Patches are [n, patch_dim], or a still's single frame [n, channels, patch * patch].
        """
        s = self.shape
        layouts = [_layout(grid, s.spatial_merge_size, self.window) for grid in grids]
        units = np.cumsum([0] + [lay.order.size for lay in layouts])
        order = np.concatenate([lay.order + start for lay, start in zip(layouts, units[:-1], strict=True)])
        frames = [h * w for t, h, w in grids for _ in range(t)]
        windowed = AttentionPlan(_segments(np.concatenate([lay.windows for lay in layouts]).tolist()), causal=False)
        full = AttentionPlan(_segments(frames), causal=False)

        x = self.patch_embed(patches)
        index = torch.from_numpy(order).to(x.device)
        x = self._by_unit(x, index)
        positions = torch.from_numpy(np.concatenate([lay.positions for lay in layouts])).to(x.device)
        angles = self._by_unit(self._angles(positions), index)[:, None, None, :]  # [N, 1, 1, D / 2]
        cos, sin = torch.cat((angles.cos(),) * 2, -1), torch.cat((-angles.sin(), angles.sin()), -1)
        for i, block in enumerate(self.blocks):
            plan = full if i in s.full_attention_blocks else windowed
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, plan, cos, sin, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, plan, cos, sin)
        return self.merger(x)[torch.argsort(index)]

    def _by_unit(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return x.view(-1, self.shape.merge_unit, x.shape[-1])[index].flatten(0, 1)

    def _angles(self, positions: torch.Tensor) -> torch.Tensor:
        """Rotary angles [N, D / 2]: half of them turn with the row, half with the column."""
        half = self.shape.hidden_size // self.shape.num_heads // 2
        steps = torch.arange(0, half, 2, dtype=torch.float32, device=positions.device) / half
        return (positions[:, :, None].float() * (1.0 / 10_000.0**steps)).flatten(1)


def patch_cost(shape: VisionShape, grid: Grid) -> int:
    """Return multiply-adds of the tower on one image: linear layers, windowed and full attention apart."""
    t, h, w = grid
    n, d = t * h * w, shape.hidden_size
    linear = n * shape.depth * (4 * d * d + 3 * d * shape.intermediate_size)
    full = len(shape.full_attention_blocks)
    window = (shape.window_size // shape.patch_size) ** 2
    return linear + 2 * n * d * (full * h * w + (shape.depth - full) * min(window, h * w))


def share_out(shape: VisionShape, grids: Sequence[Grid], ranks: int) -> list[list[int]]:
    """Assign images to ranks, the dearest first to the rank with the least to do; ties go to the lower rank."""
    load, shares = [0] * ranks, [[] for _ in range(ranks)]  # type: ignore[var-annotated]
    costs = [patch_cost(shape, grid) for grid in grids]
    for i in sorted(range(len(grids)), key=lambda i: (-costs[i], i)):
        rank = load.index(min(load))
        shares[rank].append(i)
        load[rank] += costs[i]
    return shares


class _GatherRows(torch.autograd.Function):
    """All-gather rows over the group. Backward takes this rank's rows: every rank holds the same whole gradient."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, counts: list[int], group: dist.ProcessGroup) -> torch.Tensor:
        rank = dist.get_rank(group)
        ctx.slice = (sum(counts[:rank]), sum(counts[: rank + 1]))
        padded = rows.new_zeros(max(counts), rows.shape[1])
        padded[: rows.shape[0]] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        start, stop = ctx.slice
        return grads[0][start:stop].contiguous(), None, None


def encode(tower: VisionTower, images: Sequence[ImagePatches], mesh: Mesh) -> list[torch.Tensor]:
    """Run every image through the tower once, shared out over the tensor-parallel group.

    All ranks of the group must call it with the same images; a rank without an image joins the gather.

    Returns:
        For each image its token embeddings [tokens, out_hidden], on every rank.
    """
    shape = tower.shape
    shares = share_out(shape, [image.grid_thw for image in images], mesh.tp_size)
    tokens = [int(np.prod(image.grid_thw)) // shape.merge_unit for image in images]
    mine = [images[i] for i in shares[mesh.tp_rank]]
    weight = tower.patch_embed.proj.weight
    if mine:
        rows = tower([torch.from_numpy(image.patches) for image in mine], [image.grid_thw for image in mine])
    else:
        rows = weight.new_zeros(0, shape.out_hidden_size)
    if mesh.tp_size > 1:
        if not rows.requires_grad and weight.requires_grad and torch.is_grad_enabled():
            rows.requires_grad_()  # so that every rank's graph has the same shape
        rows = _GatherRows.apply(rows, [sum(tokens[i] for i in share) for share in shares], mesh.tp_group)
    out: list[torch.Tensor | None] = [None] * len(images)
    order = [i for share in shares for i in share]
    for i, part in zip(order, rows.split([tokens[i] for i in order]), strict=True):
        out[i] = part
    return [part for part in out if part is not None]
