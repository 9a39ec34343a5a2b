"""Offloading and overlapped collectives change where numbers are and when they travel, and no bit of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import ranks

STAGED = ("plain", "both")


@pytest.fixture(scope="module")
def root(checkpoints: Path) -> Path:
    with ranks.alone():
        from tests.distributed import work_memory_phases  # imports megatron-core, which `alone` has prepared
    ranks.run(2, work_memory_phases.everything, checkpoints)
    return checkpoints


def seen(root: Path, what: str, world: int = 2) -> list[dict[str, Any]]:
    return [json.loads((root / f"{what}_{rank}.json").read_text()) for rank in range(world)]


def test_parameters_are_bit_equal_with_and_without_overlap(root):
    for one in seen(root, "overlapped"):
        assert all(norm > 0 for way in one.values() for norm in way["norms"])
        for same in (("plain", "both"), ("buckets", "buckets at the end")):
            assert len({one[way]["digest"] for way in same}) == 1
        for a, b in zip(one["plain"]["norms"], one["buckets"]["norms"], strict=True):
            assert a == pytest.approx(b, rel=1e-5)


def test_buckets_go_while_backward_works(root):
    with_images, without = seen(root, "overlapped")
    for one in (with_images, without):
        assert one["plain"]["buckets"] == [1] and one["buckets"]["buckets"][0] > 4
        assert set(one["buckets at the end"]["early"]) == {0} == set(one["plain"]["early"])
        assert one["both"]["gathering"] and not one["plain"]["gathering"]  # still after the step
    assert set(with_images["buckets"]["early"]) == {with_images["buckets"]["buckets"][0]}
    assert 0 < min(without["buckets"]["early"]) < without["buckets"]["buckets"][0]  # the tower has no gradients


def test_interleaved_stages_overlap_too(root):
    from tests.distributed import work_memory_phases

    sizes = work_memory_phases.STAGES
    ranks.run(4, work_memory_phases.overlapped, root, ways=list(STAGED), **sizes)
    for one in seen(root, "overlapped", 4):
        assert one["plain"]["digest"] == one["both"]["digest"]
        assert sum(one["both"]["early"]) > 0


def test_other_buckets_go_on_from_what_any_layout_may_load(root):
    for one in seen(root, "other_buckets"):
        assert one["resumed"] == pytest.approx(one["straight"], rel=1e-5)
        assert one["refused"] == (
            f"{root}/many_buckets/dp_reshardable: its optimizer state was saved as dp_reshardable, for another "
            "data-parallel size only, at parallel.overlap_grad_reduce=True, not False, parallel.bucket_size=20000, not "
            "None: resume with that, or save once with that and train.optimizer_format=fully_reshardable"
        )


def test_another_data_parallel_size_goes_on_from_many_buckets(root):
    from tests.distributed import work_memory_phases

    ranks.run(1, work_memory_phases.one_copy, root)
    norms = json.loads((root / "one_copy.json").read_text())
    assert norms == pytest.approx(seen(root, "other_buckets")[0]["straight"], rel=1e-5)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_offloading_keeps_all_bits(root, dtype):
    for one in seen(root, "offloaded"):
        none, *others = (one[f"{dtype} {when}"] for when in ("none", "rollout", "always"))
        for other in others:
            assert other["digest"] == none["digest"]
        for each in (none, *others):
            assert each["resumed"] == each["digest"] and each["again"] == each["straight"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_is_away_takes_no_memory(root, dtype):
    for one in seen(root, "offloaded"):
        none, rollout, always = (one[f"{dtype} {when}"] for when in ("none", "rollout", "always"))
        whole = none["held"]["after"]
        assert whole["gradients"] > 0 and whole["state"] > whole["gradients"] // 2
        assert none["held"]["rollout"] == whole and none["host"] == 0
        assert rollout["held"]["after"] == whole
        assert always["held"]["after"] == {"gradients": whole["gradients"], "state": 0}
        for each in (rollout, always):
            assert each["held"]["rollout"] == {"gradients": 0, "state": 0}
            assert each["host"] == whole["state"]
