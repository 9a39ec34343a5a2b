"""Parameters of every rank, tensor by tensor: exact, from the numbers of the model and the layout. No torch.

What a tensor-parallel rank holds is a share of each matrix (vocabulary and feed-forward width padded to a multiple of
the ranks) and the whole of norms and of the vision tower; of a tied model the last pipeline stage holds the embedding
once more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

from megatron_vlmr1.config import ParallelConfig
from megatron_vlmr1.models import families
from megatron_vlmr1.models.shape import TextShape, padded
from megatron_vlmr1.plan.shapes import PlanShape

# megatron-core's `_ParamAndGradBuffer`: tensors begin at multiples of 64 numbers, buckets end at multiples of 128.
_TENSOR_ALIGNMENT, _BUCKET_ALIGNMENT = 64, 128


@dataclass(frozen=True)
class Chunk:
    """Parameters of one chunk of layers on one rank, by tensor; a stage has one chunk, or several virtual ones."""

    tower: tuple[int, ...]  # of the vision tower; the first chunk's only
    embedding: int  # the first chunk's
    layer: tuple[int, ...]  # of one layer
    layers: int
    norm: int  # the last chunk's
    output: int  # the last chunk's, where it is not the embedding itself
    shared: bool  # whether embedding and output are copies of each other on two stages

    @property
    def parameters(self) -> int:
        """Parameters of this chunk."""
        return sum(self.tower) + self.embedding + sum(self.layer) * self.layers + self.norm + self.output

    def buckets(self, dp: int, with_tower: bool) -> list[int]:
        """Numbers in each bucket of the flat buffers that hold parameters, and of those that hold gradients.

        A copy of a shared embedding has a bucket of its own, and so has what comes before and after it
        (`_does_param_require_new_bucket`).

        Args:
            dp: data-parallel size.
            with_tower: whether the tower is trained; what is fixed is in no buffer.
        """
        tower = sum(padded(n, _TENSOR_ALIGNMENT) for n in self.tower) if with_tower else 0
        rest = sum(padded(n, _TENSOR_ALIGNMENT) for n in self.layer) * self.layers
        vocabulary = [padded(n, _TENSOR_ALIGNMENT) for n in (self.embedding, self.output) if n]
        rest += padded(self.norm, _TENSOR_ALIGNMENT)
        buckets = [rest, *vocabulary, tower] if self.shared else [rest + sum(vocabulary) + tower]
        return [padded(bucket, math.lcm(dp, _BUCKET_ALIGNMENT)) for bucket in buckets if bucket]

    @property
    def largest(self) -> int:
        """Parameters of the largest tensor."""
        return max(*self.tower, *self.layer, self.embedding, self.output, 0)


def stage_chunks(shape: PlanShape, layout: ParallelConfig, stage: int) -> list[Chunk]:
    """Return the chunks of a pipeline stage, in the order in which a token meets them."""
    text, tp, pp = shape.text, layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    vocabulary = padded(text.vocab_size, tp) // tp * text.hidden_size
    own, layer = stage_layers(layout, text.num_layers, stage), layer_tensors(shape, tp)
    out = []
    for number, layers in enumerate(own):
        first, last = stage == 0 and number == 0, stage == pp - 1 and number == len(own) - 1
        out.append(
            Chunk(
                tower=tower_tensors(shape) if first else (),
                embedding=vocabulary if first else 0,
                layer=layer,
                layers=len(layers),
                norm=text.hidden_size if last else 0,
                output=vocabulary if last and (pp > 1 or not text.tied) else 0,
                shared=text.tied and pp > 1 and (first or last),
            )
        )
    return out


def stage_layers(layout: ParallelConfig, num_layers: int, stage: int) -> list[range]:
    """Return the numbers of the layers of each chunk of a pipeline stage."""
    sizes = layout.layers_by_chunk(num_layers)
    ends = list(accumulate(sizes))
    mine = range(stage, len(sizes), layout.pipeline_model_parallel_size)
    return [range(ends[chunk] - sizes[chunk], ends[chunk]) for chunk in mine]


def layer_tensors(shape: PlanShape, tp: int) -> tuple[int, ...]:
    """Return the parameters of each tensor of a decoder layer on one tensor-parallel rank."""
    t = shape.text
    width, qkv = t.num_heads * t.head_dim, (t.num_heads + 2 * t.num_kv_heads) * t.head_dim
    ffn = padded(t.ffn_hidden_size, tp) // tp
    norms = [t.hidden_size] * 2 + ([t.head_dim] * 2 if shape.qk_norm else [])
    biases = [qkv // tp] if shape.qkv_bias else []
    matrices = [qkv // tp * t.hidden_size, width // tp * t.hidden_size, 2 * ffn * t.hidden_size, ffn * t.hidden_size]
    return (*norms, *biases, *matrices)


def tower_tensors(shape: PlanShape) -> tuple[int, ...]:
    """Return the parameters of each tensor of the vision tower, which every rank of the first stage holds whole."""
    if shape.vision is None or shape.vlm is None:
        return ()
    return tuple(math.prod(size) for size in families.of(shape.vlm).vision_shapes(shape.vision).values())


def kv_heads(text: TextShape, tp: int) -> int:
    """Key/value heads of a rank; with fewer heads than ranks, several ranks hold the same one."""
    return max(1, text.num_kv_heads // tp)


def cache_numbers(text: TextShape, tp: int, layers: int) -> int:
    """Numbers that a token has in the key/value cache of a rank."""
    return layers * 2 * kv_heads(text, tp) * text.head_dim
