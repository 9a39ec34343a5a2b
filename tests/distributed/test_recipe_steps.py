"""Every recipe, loaded as it is with only its model's widths divided, on four ranks (TP=2 PP=2) and in one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_vlmr1 import config
from tests import recipes
from tests.distributed import plain, ranks
from tests.distributed.plain import within

pytestmark = pytest.mark.timeout(900)  # the first test's includes the job of all of them


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("recipes")
    for size in recipes.SIZES:
        recipes.write_thin_checkpoint(root / size / "model", size)
    with ranks.alone() as mesh:
        from tests.distributed import work_recipes

        for size in recipes.SIZES:
            work_recipes.two_steps(root, size, "one", 1, 1, mesh)
    ranks.run(4, work_recipes.on_four_ranks, root, sizes=list(recipes.SIZES))
    return root


@pytest.mark.parametrize("size", recipes.SIZES)
def test_four_ranks_are_one_process(two_steps, size, record_property):
    start, one, four = (plain.read(two_steps / size / name) for name in ("model", "one", "four"))
    frozen = config.load(recipes.path(size)).model.freeze_vision
    towers = [name for name in start if name.startswith("visual.")]
    assert all(bool((start[name] != one[name]).any()) != frozen for name in towers) and len(towers) > 32 * 10
    moved = float((plain.flat(one) - plain.flat(start)).norm())
    assert moved > 0
    within(record_property, size, float((plain.flat(one) - plain.flat(four)).norm()) / moved, 1e-2)
    alone, other = (json.loads((two_steps / size / f"{name}.json").read_text())["metrics"] for name in ("one", "four"))
    assert alone[0]["train/grad_norm"] > 0
    norms = [abs(b["train/grad_norm"] / a["train/grad_norm"] - 1) for a, b in zip(alone, other, strict=True)]
    within(record_property, f"{size} first gradient norm", norms[0], 1e-5)
    within(record_property, f"{size} second gradient norm", norms[1], 1e-3)
    for name in ("train/loss", "grpo/entropy", "train/tokens", "grpo/kl"):
        for a, b in zip(alone, other, strict=True):
            assert b[name] == pytest.approx(a[name], rel=1e-5, abs=1e-6), name
