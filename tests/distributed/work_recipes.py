"""Two GRPO steps of a recipe, built as the training loop builds it, on a replayed rollout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from megatron_vlmr1.grpo.reference import Reference
from megatron_vlmr1.grpo.update import GrpoUpdate, Updater
from megatron_vlmr1.parallel import mesh as meshes
from megatron_vlmr1.parallel import optimizer as parallel_optimizer
from megatron_vlmr1.parallel.mesh import Mesh
from megatron_vlmr1.rollout.actor import Actor
from megatron_vlmr1.runtime.seeds import seed_everything
from megatron_vlmr1.types import Completion, Group
from tests import recipes
from tests.checkpoints import PLAIN_IDS, mixed_prompts
from tests.distributed import work

GENERATIONS = 3


def rollout(directory: Path) -> list[Group]:
    """Draw groups of completions with advantages, one of them without a score; no, one and two images."""
    rng = np.random.default_rng(7)
    groups = []
    for prompt in mixed_prompts(directory)[:4]:
        rows = [rng.integers(0, PLAIN_IDS, n) for n in rng.integers(1, 8, GENERATIONS)]
        completions = tuple(Completion(row, np.zeros(len(row), np.float32), "length", "") for row in rows)
        advantages = rng.standard_normal(GENERATIONS).astype(np.float32)
        advantages[0] = np.nan if prompt.position == 1 else advantages[0]
        groups.append(Group(prompt, completions, (), advantages))
    return groups


def two_steps(root: Path, size: str, name: str, tp: int, pp: int, mesh: Mesh) -> None:
    """Take them; write the weights under ``root/size/name`` and the metrics beside it."""
    source = root / size / "model"
    cfg = recipes.thin_config(size, source, tp, pp)
    actor = Actor(source, cfg, mesh)
    reference = Reference(actor.policy)
    optimizer = parallel_optimizer.build(cfg.optimizer, actor.policy.wrap_for_training())
    update = GrpoUpdate(Updater(actor.policy, optimizer, cfg), reference)
    groups = work.share(rollout(source), mesh)
    metrics = [update(groups, cfg.optimizer.lr) for _ in range(2)]
    work.write_weights(actor.policy, source, root / size / name)
    if mesh.rank == 0:
        facts = {"metrics": metrics, "parallel": mesh.describe()}
        (root / size / f"{name}.json").write_text(json.dumps(facts))


def on_four_ranks(root: Path, sizes: list[str]) -> None:
    """Run each recipe at TP=2 PP=2."""
    for size in sizes:
        cfg = recipes.thin_config(size, root / size / "model", 2, 2)
        mesh = meshes.build(cfg.parallel)
        seed_everything(cfg.seed)
        two_steps(root, size, "four", 2, 2, mesh)
        meshes.destroy()
