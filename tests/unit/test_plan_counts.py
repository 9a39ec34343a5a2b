"""Every rank's parameters, counted from numbers: against transformers' models, the readers' tables, our models."""

from __future__ import annotations

import functools
import math

import pytest

from megatron_vlmr1 import config
from megatron_vlmr1.models import families
from megatron_vlmr1.models.pieces import OF_A_LAYER
from megatron_vlmr1.models.shape import padded
from megatron_vlmr1.plan.counts import Chunk, layer_tensors, stage_chunks, stage_layers
from megatron_vlmr1.plan.memory import rank_memory
from megatron_vlmr1.plan.shapes import PlanShape, read_plan_shape
from tests import recipes


def divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]


def legal(shape: PlanShape) -> list[tuple[int, int]]:
    """All tensor x pipeline sizes that divide evenly."""
    heads, kv = shape.text.num_heads, shape.text.num_kv_heads
    rows = (heads + 2 * kv) * shape.text.head_dim
    tensor = [tp for tp in divisors(heads) if (kv % tp == 0 or tp % kv == 0) and rows % tp == 0]
    return [(tp, pp) for tp in tensor for pp in divisors(shape.text.num_layers)]


def accepted(shape: PlanShape, tp: int) -> bool:
    """Whether the program takes a tensor-parallel size."""
    try:
        shape.check_layout(recipes.layout(tp, layers=[shape.text.num_layers]))
    except ValueError:
        return False
    return True


@functools.cache
def transformers_counts(size: str) -> tuple[int, int, int]:
    """Parameters of transformers' model, of its tower, and of one decoder layer's norms; none of it has memory."""
    import torch
    from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

    read = AutoConfig.from_pretrained(str(recipes.published(size)))
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(read)
    layer = model.model.language_model.layers[0]
    norms = sum(p.numel() for name, p in layer.named_parameters() if "norm" in name)
    tower = sum(p.numel() for p in model.model.visual.parameters())
    return sum(p.numel() for p in model.parameters()), tower, norms


def settings(tp: int, pp: int, **sections: object) -> config.Config:
    layout = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    return config.parse({"model": {"path": "-"}, "data": {"train": "-"}, "parallel": layout, **sections}, "test")


@pytest.mark.parametrize("size", recipes.SIZES)
def test_ranks_together_hold_what_transformers_counts(size):
    """And besides: towers and norms once more for each further rank, a tied embedding twice, and padding."""
    shape = read_plan_shape(f"qwen2.5-vl-{size}")
    whole, tower, norms = transformers_counts(size)
    t = shape.text
    layouts = legal(shape)
    assert [tp for tp in range(1, t.num_heads + 1) if accepted(shape, tp)] == sorted({tp for tp, _ in layouts})
    assert len(layouts) >= 18
    for tp, pp in layouts:
        stages = rank_memory(settings(tp, pp, rollout={"max_cache_tokens": 1 << 40}), shape, tp * pp)
        assert len(stages) == pp
        replicated = (tp - 1) * (tower + t.num_layers * norms + t.hidden_size)
        vocabulary, width = padded(t.vocab_size, tp), padded(t.ffn_hidden_size, tp)
        tables = 1 if t.tied and pp == 1 else 2
        padding = tables * (vocabulary - t.vocab_size) * t.hidden_size
        padding += 3 * t.num_layers * (width - t.ffn_hidden_size) * t.hidden_size
        second = t.vocab_size * t.hidden_size if t.tied and pp > 1 else 0
        assert tp * sum(stage.parameters for stage in stages) == whole + replicated + padding + second, (tp, pp)


@pytest.mark.parametrize("size", recipes.SIZES)
def test_every_rank_holds_what_is_read_for_it(size):
    """Tensor by tensor, against the pieces of published tensors that each tensor-parallel rank's parameters have."""
    shape = read_plan_shape(f"qwen2.5-vl-{size}")
    assert shape.vlm is not None
    family, sizes = families.of(shape.vlm), families.of(shape.vlm).tensor_shapes(shape.vlm)

    def numel(name: str, layer: int | None, rank: int, tp: int) -> int:
        count = 0
        for piece in family.text_pieces(shape.vlm, name, layer, rank, tp):
            whole = sizes[piece.name] if piece.name else (0, shape.text.hidden_size)
            count += (piece.stop - piece.start) * (math.prod(whole) // whole[piece.dim] if piece.name else whole[1])
        return count

    for tp in sorted({tp for tp, _ in legal(shape)}):
        chunk: Chunk
        (chunk,) = stage_chunks(shape, recipes.layout(tp), 0)
        (first, *_, last) = (stage_chunks(shape, recipes.layout(tp, 2), stage)[0] for stage in (0, 1))
        for rank in range(tp):
            layer = sorted(numel(name, 0, rank, tp) for name in OF_A_LAYER)
            assert layer == sorted(layer_tensors(shape, tp)) and layer == sorted(chunk.layer)
            assert numel("embedding.word_embeddings.weight", None, rank, tp) == chunk.embedding == first.embedding
            assert numel("output_layer.weight", None, rank, tp) == last.output
            assert numel("decoder.final_layernorm.weight", None, rank, tp) == last.norm
        assert chunk.output == (0 if shape.text.tied else last.output)


MODELS = [("3b", 2, 2, 1), ("3b", 8, 1, 1), ("7b", 4, 2, 2), ("32b", 8, 4, 1), ("72b", 8, 4, 2)]


@pytest.mark.parametrize("size, tp, pp, vp", MODELS)
def test_our_own_models_without_memory(size, tp, pp, vp):
    """The first and the last rank's modules, as training builds them: counts, bytes, and layers by chunk."""
    import torch

    from megatron_vlmr1.runtime import device

    device.prepare_megatron()
    from megatron_vlmr1.parallel import mesh as meshes

    shape = read_plan_shape(f"qwen2.5-vl-{size}")
    layout = recipes.layout(tp, pp, vp)
    with meshes.pretending():
        from megatron_vlmr1.config import RecomputeConfig
        from megatron_vlmr1.models.vlm import build_chunks

        for stage in {0, pp - 1}:
            mesh = meshes.pretended(layout, tp - 1, stage)
            with meshes.building_for(mesh), device.without_memory():
                built = build_chunks(shape.vlm, mesh, torch.bfloat16, RecomputeConfig())
            counted = stage_chunks(shape, layout, stage)
            assert [sum(p.numel() for p in chunk.parameters()) for chunk in built] == [c.parameters for c in counted]
            assert [sum(p.nbytes for p in chunk.parameters()) for chunk in built] == [2 * c.parameters for c in counted]
            assert [len(chunk.language.decoder.layers) for chunk in built] == [c.layers for c in counted]


def test_layers_of_uneven_and_virtual_stages():
    uneven = recipes.layout(1, 2, 2, [1, 2, 3, 4])
    assert [stage_layers(uneven, 10, stage) for stage in (0, 1)] == [
        [range(0, 1), range(3, 6)],
        [range(1, 3), range(6, 10)],
    ]


def test_flat_buffers_are_padded_as_megatron_core_pads_them():
    """By hand: tensors begin at multiples of 64, buckets end at multiples of lcm(ranks, 128)."""
    chunk = Chunk(tower=(100,), embedding=1000, layer=(10, 70), layers=2, norm=10, output=0, shared=False)
    assert chunk.parameters == 1270
    inner = 2 * (64 + 128) + 64 + 1024
    assert chunk.buckets(1, with_tower=True) == [padded(inner + 128, 128)]
    assert chunk.buckets(3, with_tower=False) == [padded(inner, 384)]
    shared = Chunk(tower=(100,), embedding=1000, layer=(10, 70), layers=2, norm=0, output=0, shared=True)
    assert shared.buckets(1, with_tower=True) == [384, 1024, 128]
