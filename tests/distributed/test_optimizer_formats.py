"""Both formats of the optimizer's state hold the same numbers, and each resumes where it should."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.checkpoints import write_random_checkpoint
from tests.distributed import ranks
from tests.distributed.test_pair_state import logical_tensors


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """What one process and two ranks saved; see `work_formats`."""
    root = tmp_path_factory.mktemp("formats")
    write_random_checkpoint(root / "weights", num_hidden_layers=4)
    with ranks.alone() as mesh:
        from tests.distributed import work_formats  # imports megatron-core, which `alone` has prepared

        with torch.random.fork_rng():
            work_formats.both_formats(root, "one", mesh)
    ranks.run(2, work_formats.everything, root)
    with ranks.alone() as mesh, torch.random.fork_rng():
        work_formats.save_again(root, "dp2", "dp2_at_one", mesh)
    return root


def assert_same(a: Path, b: Path) -> None:
    left, right = logical_tensors(a / "optimizer"), logical_tensors(b / "optimizer")
    assert left.keys() == right.keys() and len(left) > 100
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.mark.parametrize("name", ["dp2", "tp2", "pp2_vp2"])
def test_the_same_layout_goes_on_from_its_own_parts(results, name):
    assert_same(results / name / "fully_reshardable", results / f"{name}_again")


@pytest.mark.parametrize(("name", "again"), [("dp2", "dp2_at_one"), ("one", "one_at_dp2")])
def test_another_data_parallel_size_goes_on_from_them(results, name, again):
    assert_same(results / name / "fully_reshardable", results / again)


def test_another_cut_of_the_model_is_refused_in_one_line(results):
    lines = {(results / f"refused_{rank}.txt").read_text() for rank in range(2)}
    saved = results / "dp2/dp_reshardable"
    assert lines == {
        f"{saved}: its optimizer state was saved as dp_reshardable, for another data-parallel size only, at "
        "parallel.tensor_model_parallel_size=1, not 2: resume with that, or save once with that and "
        "train.optimizer_format=fully_reshardable"
    }


def test_what_threads_write_is_of_the_time_of_the_call(results):
    everyone = [json.loads((results / f"late_{rank}.json").read_text()) for rank in range(2)]
    assert everyone[1] == [{}] * 4
    for at_once, late in (everyone[0][:2], everyone[0][2:]):
        tensors = [name for name in at_once if name.endswith((".safetensors", ".distcp", ".pt"))]
        assert {f"hf/model-0000{i}-of-00002.safetensors" for i in (1, 2)} < set(tensors)
        assert {f"state/rng_0000{rank}.safetensors" for rank in range(2)} < set(tensors)
        assert {f"state/optimizer/__{rank}_0.distcp" for rank in range(2)} < set(tensors)
        assert {name: late[name] for name in tensors} == {name: at_once[name] for name in tensors}
