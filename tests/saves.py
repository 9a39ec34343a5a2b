"""A tiny policy in training, and a save of it that lets everything change before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_vlmr1 import config
from megatron_vlmr1.checkpoint.background import Writes
from megatron_vlmr1.checkpoint.save import Save
from megatron_vlmr1.checkpoint.staging import Staging
from megatron_vlmr1.parallel import optimizer as parallel_optimizer
from megatron_vlmr1.parallel.mesh import Mesh
from megatron_vlmr1.train.checkpoints import Checkpoints
from tests.distributed import work


def in_training(weights: Path, mesh: Mesh) -> tuple[Any, Any]:
    """Return a policy and its optimizer, which has taken a step with random gradients."""
    policy = work.load_policy(weights, mesh)
    optimizer = parallel_optimizer.build(work.settings().optimizer, policy.wrap_for_training())
    take_step(policy, optimizer)
    return policy, optimizer


def take_step(policy: Any, optimizer: Any) -> None:
    """Change every weight, master and moment."""
    for parameter in (p for chunk in policy.chunks for p in chunk.parameters()):
        parameter.main_grad.normal_()
    optimizer.step()


def write_at_once(policy: Any, optimizer: Any, source: Path, kind: str, out: Path) -> dict[str, str]:
    """Save; return the sha256 of each file on the first rank."""
    return _written(Save(_folders(out, policy), policy, None), optimizer, source, kind)


def write_late(
    policy: Any, optimizer: Any, source: Path, kind: str, out: Path, staging: Staging, monkeypatch: Any
) -> dict[str, str]:
    """The same in a thread that begins when weights, optimizer and generators are no longer what they were."""
    start = Writes.start

    def change_and_start(self: Writes) -> None:
        take_step(policy, optimizer)
        for parameter in (p for chunk in policy.chunks for p in chunk.parameters()):
            parameter.data.add_(1.0)
        torch.rand(7)
        start(self)

    with monkeypatch.context() as patch:
        patch.setattr(Writes, "start", change_and_start)
        return _written(Save(_folders(out, policy), policy, staging), optimizer, source, kind)


def _written(save: Save, optimizer: Any, source: Path, kind: str) -> dict[str, str]:
    save.stage(optimizer, source, {"step": 1}, kind)
    return {name: entry["sha256"] for name, entry in save.finish().items()}


def _folders(out: Path, policy: Any) -> Path:
    if policy.mesh.rank == 0:
        for name in ("hf", "state"):
            (out / name).mkdir(parents=True)
    torch.distributed.barrier()
    return out


def checkpoints_of(run_dir: Path, mesh: Mesh, **train: Any) -> Checkpoints:
    """Return the checkpoints of a run with these settings of `train`."""
    raw = {"run_dir": str(run_dir), "model": {"path": "none"}, "data": {"train": "none"}, "train": train}
    return Checkpoints(config.parse(raw, "test"), mesh)


def progress(step: int, checkpoints: Checkpoints, **facts: Any) -> dict[str, Any]:
    """Return the least that a run saves."""
    return {"step": step, "config": checkpoints.cfg.model_dump(mode="json"), **facts}
