"""The tower's share-out of images, its layouts, and the shapes that a model can be cut into."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_vlmr1.data.images import pixel_values
from megatron_vlmr1.models.families import read_shape
from megatron_vlmr1.models.vision import encode, patch_cost, share_out
from tests.checkpoints import plain_model, random_image, write_random_checkpoint
from tests.distributed import ranks, work
from tests.recipes import layout

GRIDS = [(1, 8, 8), (1, 2, 2), (1, 20, 10), (1, 4, 6), (1, 2, 18), (1, 6, 10)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_random_checkpoint(tmp_path_factory.mktemp("vision") / "model", seed=4)


def test_image_embeddings_are_those_of_transformers(directory):
    """All grids in one call: windows cut at the edges, one window, one token."""
    images = tuple(random_image(i, h, w) for i, (_, h, w) in enumerate(GRIDS))
    model = plain_model(directory)
    with ranks.alone() as mesh, torch.no_grad():
        found = encode(work.load_policy(directory, mesh).model.vision, images, mesh)
        for image, rows in zip(images, found, strict=True):
            expected = model.model.visual(torch.from_numpy(pixel_values(image)), torch.tensor([image.grid_thw]))
            expected = getattr(expected, "pooler_output", expected)
            assert rows.shape == expected.shape == (len(image.patches) // 4, 64)
            assert (rows - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_every_image_has_one_rank_and_the_work_is_even(directory, count):
    shape = read_shape(directory).vision
    rng = np.random.default_rng(count)
    for images in (0, 1, 2, 5, 40):
        grids = [(1, int(2 * h), int(2 * w)) for h, w in rng.integers(1, 30, (images, 2))]
        shares = share_out(shape, grids, count)
        assert len(shares) == count and sorted(i for share in shares for i in share) == list(range(images))
        loads = [sum(patch_cost(shape, grids[i]) for i in share) for share in shares]
        dearest = max((patch_cost(shape, grid) for grid in grids), default=0)
        assert max(loads) - min(loads) <= dearest
        assert shares == share_out(shape, grids, count)


def test_cost_of_full_attention_grows_with_the_square(directory):
    shape = read_shape(directory).vision
    small, large = (patch_cost(shape, (1, side, side)) for side in (40, 80))
    assert 4 * small < large < 16 * small
    windowed = replace(shape, full_attention_blocks=())
    assert patch_cost(windowed, (1, 80, 80)) == 4 * patch_cost(windowed, (1, 40, 40))


@pytest.mark.parametrize(
    ("tp", "pp", "words"),
    [
        (
            3,
            1,
            "size=3 does not divide the model's 4 attention heads; nearest tensor x pipeline sizes that fit: 4 x 1, 2",
        ),
        (
            1,
            3,
            "say in parallel.pipeline_layers how to cut them; nearest tensor x pipeline sizes that fit: 1 x 4, 1 x 2",
        ),
        (8, 1, "attention heads; nearest tensor x pipeline sizes that fit: 4 x 1, 2 x 1, 4 x 2"),
    ],
)
def test_a_layout_that_does_not_divide(directory, tp, pp, words):
    with pytest.raises(ValueError, match=".") as caught:
        read_shape(directory).check_layout(layout(tp, pp))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_how_layers_are_cut_into_chunks(directory):
    shape = read_shape(directory)  # four layers
    for cut in (layout(pp=2, vp=2), layout(pp=2, layers=[1, 3]), layout(pp=2, vp=2, layers=[1, 1, 1, 1])):
        shape.check_layout(cut)
    assert layout(pp=2, vp=3).layers_by_chunk(12) == (2, 2, 2, 2, 2, 2)
    assert layout(pp=2, vp=2, layers=[3, 5, 2, 1]).layers_by_chunk(11) == (3, 5, 2, 1)
    with pytest.raises(ValueError, match="=2 x virtual_pipeline_model_parallel_size=3 does not divide the model's 4"):
        shape.check_layout(layout(pp=2, vp=3))
    with pytest.raises(ValueError, match=r"pipeline_layers=\[2, 3\] adds up to 5 layers, but the model has 4"):
        shape.check_layout(layout(pp=2, layers=[2, 3]))
    with pytest.raises(ValueError, match="pipeline_layers has 2 numbers; pipeline x virtual pipeline size is 4"):
        layout(pp=2, vp=2, layers=[2, 2])
    with pytest.raises(ValueError, match="virtual_pipeline_model_parallel_size needs pipeline_model_parallel_size > 1"):
        layout(vp=2)


def test_key_value_heads_and_ranks(directory):
    shape = read_shape(directory)
    odd = replace(shape, text=replace(shape.text, num_heads=12, num_kv_heads=3, ffn_hidden_size=96))
    with pytest.raises(ValueError, match="3 key/value heads: one must divide the other"):
        odd.check_layout(layout(2))
    odd.check_layout(layout(3))
    odd.check_layout(layout(6))
    for tp, pp in ((1, 1), (2, 2), (4, 4)):
        shape.check_layout(layout(tp, pp))


def test_more_ranks_than_the_layout_takes():
    from megatron_vlmr1.parallel import mesh

    with ranks.alone():
        with pytest.raises(ValueError, match="1 ranks cannot hold parallel.tensor_model_parallel_size=2"):
            mesh.build(ranks.LAYOUTS["tp2"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "config.json: not found"),
        ("{", "not valid JSON"),
        ("[]", "model_type None is not supported"),
        ('{"model_type": "llama"}', "model_type 'llama' is not supported; known: qwen2_5_vl"),
        ('{"model_type": "qwen2_5_vl"}', "missing or malformed 'vision_config'"),
        ('{"model_type": "qwen2_5_vl", "vision_config": 3, "text_config": {}}', "missing or malformed"),
    ],
)
def test_a_config_that_is_no_model(tmp_path, content, words):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=".") as caught:
        read_shape(tmp_path)
    assert words in str(caught.value) and "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
