"""Training state in one process: what is refused, and that nothing of a hostile state runs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from megatron_vlmr1.checkpoint import state
from megatron_vlmr1.parallel import optimizer as parallel_optimizer
from tests.checkpoints import write_random_checkpoint
from tests.distributed import ranks, work


class Hostile:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A policy with an optimizer that has taken a step, and the directory of its saved state."""
    root = tmp_path_factory.mktemp("state")
    directory = write_random_checkpoint(root / "model", num_hidden_layers=2)
    with ranks.alone() as mesh:
        policy = work.load_policy(directory, mesh)
        optimizer = parallel_optimizer.build(work.settings().optimizer, policy.wrap_for_training())
        for parameter in policy.model.parameters():
            parameter.main_grad.normal_()
        optimizer.step()
        (root / "saved").mkdir()
        state.save(policy, optimizer, {"step": 1, "list": [1, 2]}, root / "saved")
        yield policy, optimizer, root / "saved"


@pytest.fixture
def saved(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained[2], tmp_path / "state"))


def moments(optimizer) -> list[torch.Tensor]:
    (inner,) = optimizer.chained_optimizers
    tensors = [s[key] for s in inner.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq", "step")]
    return [tensor.clone() for tensor in tensors]


def test_load_restores_optimizer_generator_and_progress(trained, saved):
    policy, optimizer, _ = trained
    expected, generator = moments(optimizer), torch.get_rng_state()
    for parameter in policy.model.parameters():
        parameter.main_grad.normal_()
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(expected, moments(optimizer), strict=True))
    assert state.load(policy, optimizer, saved) == {"step": 1, "list": [1, 2]}
    assert all(torch.equal(a, b) for a, b in zip(expected, moments(optimizer), strict=True))
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_hostile_metadata_file(trained, saved, tmp_path):
    (saved / "optimizer" / ".metadata").write_bytes(pickle.dumps(Hostile(tmp_path / "mark")))
    with pytest.raises(ValueError, match="refused before loading"):
        state.load(*trained[:2], saved)
    assert not (tmp_path / "mark").exists()


def test_hostile_objects_beside_the_tensors(trained, saved, tmp_path):
    paths = [path for path in (saved / "optimizer").iterdir() if path.suffix == ".pt"]
    assert paths
    for path in paths:
        torch.save({"optimizer": Hostile(tmp_path / "mark")}, path)
    with pytest.raises(Exception, match="(?i)weights.only"):
        state.load(*trained[:2], saved)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("content", [None, "", "{", "[1]", "\x00"])
def test_progress_that_is_none(trained, saved, content):
    path = saved / "progress.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match="progress.json: not"):
        state.load(*trained[:2], saved)


def test_no_state_at_all(trained, tmp_path):
    with pytest.raises(ValueError, match="not a megatron-core checkpoint"):
        state.load(*trained[:2], tmp_path)


def test_a_state_that_was_padded_to_another_width(trained, saved):
    policy, optimizer, _ = trained  # 96 units wide, on one rank
    progress = {"config": {"parallel": {"tensor_model_parallel_size": 5}}}
    (saved / "progress.json").write_text(json.dumps(progress))
    with pytest.raises(
        ValueError, match="_size=5, which pads the feed-forward width 96 to 100; 1 pads it to 96: resume"
    ):
        state.load(policy, optimizer, saved)
    progress["config"]["parallel"]["tensor_model_parallel_size"] = 4
    (saved / "progress.json").write_text(json.dumps(progress))
    assert state.load(policy, optimizer, saved) == progress
