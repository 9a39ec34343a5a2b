"""The recipes against the published models' shapes: they divide, they fit, and among them is what they promise."""

from __future__ import annotations

import pytest

from megatron_vlmr1 import config
from megatron_vlmr1.cli.main import main
from megatron_vlmr1.plan.memory import rank_memory
from megatron_vlmr1.plan.shapes import read_plan_shape
from tests import recipes

RANKS = {"3b": 8, "7b": 8, "32b": 16, "72b": 64}  # as their first lines say
H100_BYTES = 80e9


@pytest.mark.parametrize("size", recipes.SIZES)
def test_dry_run_and_memory(capfd, size):
    model = recipes.published(size)
    words = ["train", f"configs/recipe/{size}.yaml", "--dry-run", "--nproc", str(RANKS[size]), f"model.path={model}"]
    assert main(words) == 0
    out = capfd.readouterr().out
    assert f"# {RANKS[size]} ranks: tensor " in out and "# a rank of stage 0: " in out
    cfg = config.load(recipes.path(size), [f"model.path={model}"])
    for stage in rank_memory(cfg, read_plan_shape(model), RANKS[size]):
        assert stage.worst()[1] < 0.9 * H100_BYTES, stage  # the rest is for what the allocator cannot use


def test_what_is_among_them():
    cfgs = {size: config.load(recipes.path(size)) for size in recipes.SIZES}
    layouts = {size: cfg.parallel for size, cfg in cfgs.items()}
    assert {size for size, p in layouts.items() if p.pipeline_layers is not None} == {"32b", "72b"}
    assert all(len(set(p.pipeline_layers)) > 1 for p in layouts.values() if p.pipeline_layers)
    assert {size for size, p in layouts.items() if p.virtual_pipeline_model_parallel_size > 1} == {"72b"}
    assert {size: cfg.recompute.granularity for size, cfg in cfgs.items()} == {
        "3b": "none",
        "7b": "selective",
        "32b": "full",
        "72b": "full",
    }
    assert {size for size, cfg in cfgs.items() if cfg.recompute.tower} == {"3b", "7b", "32b"}
    assert {size for size, cfg in cfgs.items() if cfg.model.freeze_vision} == {"72b"}
    for cfg in cfgs.values():  # as published
        published = (cfg.optimizer.lr, cfg.grpo.beta, cfg.rollout.num_generations, cfg.train.prompts_per_step)
        assert published == (1e-6, 0.04, 8, 16)


def test_thin_layouts_keep_what_makes_them_uneven(tmp_path):
    assert recipes.thin_config("32b", tmp_path, 2, 2).parallel.pipeline_layers == [31, 33]
    thin = recipes.thin_config("72b", tmp_path, 2, 2).parallel
    assert (thin.pipeline_layers, thin.virtual_pipeline_model_parallel_size) == ([21, 20, 20, 19], 2)
    alone = recipes.thin_config("72b", tmp_path, 1, 1).parallel
    assert (alone.pipeline_layers, alone.chunks, alone.sequence_parallel) == (None, 1, False)
