"""What two ranks do in tests of bad numbers: copies damaged and sound, steps that are not finite."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_vlmr1.data.packing import MicroBatch
from megatron_vlmr1.errors import RunStopped
from megatron_vlmr1.grpo.update import GrpoUpdate, Updater, label_tensors
from megatron_vlmr1.parallel import optimizer as parallel_optimizer
from megatron_vlmr1.parallel.mesh import Mesh
from megatron_vlmr1.types import Completion, Group
from tests.checkpoints import mixed_prompts
from tests.distributed import work
from tests.distributed.ranks import layout

BF16, FP32 = torch.bfloat16, torch.float32
# layout, checkpoint, type, frozen tower, optimizer steps on each batch
SOUND = (
    ("tp2", "untied", FP32, False, 1),
    ("tp2", "untied", BF16, True, 2),
    ("tp2_sp", "untied", FP32, False, 1),
    ("dp2", "untied", BF16, False, 2),
    ("dp2", "tied", FP32, True, 1),
    ("pp2", "tied", FP32, False, 2),
    ("pp2_vp2", "untied", BF16, False, 1),
)
# name: layout, type, what is damaged, on which rank
DAMAGE = {
    "copy": ("dp2", BF16, "parameter language.decoder.final_layernorm.weight", 1),
    "tower copy": ("dp2", BF16, "parameter vision.", 0),
    "norm": ("tp2", BF16, "parameter language.decoder.layers.1.input_layernorm.weight", 1),
    "tower": ("tp2", BF16, "parameter vision.", 0),
    "master": ("dp2", BF16, "the fp32 master of ", 1),
    "master of a stage": ("pp2", BF16, "the fp32 master of ", 0),
    "moment": ("tp2", BF16, "exp_avg_sq of ", 1),
    "parameter in fp32": ("tp2", FP32, "parameter language.decoder.layers.0.mlp.linear_fc1.weight", 1),
}


def everything(root: Path) -> None:
    """All of it in one job."""
    seen: dict[str, Any] = {"sound": {}, "damage": {}, "bad": {}}
    for name, which, dtype, frozen, iterations in SOUND:
        with layout(name) as mesh:
            key = f"{name} {which} {dtype} {frozen} {iterations}"
            seen["sound"][key] = sound(root / which, mesh, dtype, frozen, iterations)
    for case, (name, dtype, what, rank) in DAMAGE.items():
        with layout(name) as mesh:
            seen["damage"][case] = damaged(root / "untied", mesh, dtype, what, rank)
            out = mesh.rank
    for name in ("tp2", "dp2"):
        with layout(name) as mesh:
            for kind in ("loss", "gradient", "only the loss"):
                seen["bad"][f"{name} {kind}"] = bad_steps(root / "untied", mesh, kind)
    (root / f"replicas_{out}.json").write_text(json.dumps(seen))


class Trainer:
    """A policy in training on completions that were drawn at random."""

    def __init__(self, source: Path, mesh: Mesh, dtype: torch.dtype, frozen: bool = False, iterations: int = 1) -> None:
        self.mesh = mesh
        self.policy = work.load_policy(source, mesh, freeze_vision=frozen, dtype=dtype)
        grpo = {"beta": 0.0, "num_iterations": iterations}
        cfg = work.settings(grpo=grpo, precision="bf16" if dtype is BF16 else "fp32")
        self.optimizer = parallel_optimizer.build(cfg.optimizer, self.policy.wrap_for_training())
        self.updater = Updater(self.policy, self.optimizer, cfg)
        self._update = GrpoUpdate(self.updater, None)
        self.groups = work.share(drawn_groups(source), mesh)

    def step(self) -> dict[str, float]:
        """Take a step."""
        return self._update(self.groups, work.LEARNING_RATE)

    def state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield all that a step may change: parameters, masters, moments, step counts."""
        for i, parameter in enumerate(self.policy.parameters()):
            yield f"parameter {i}", parameter.detach()
        for inner in self.optimizer.chained_optimizers:
            for shard, kept in inner.optimizer.state.items():
                yield "master", shard.detach()
                yield from kept.items()

    def digest(self) -> str:
        """Return a sha256 of `state`."""
        total = hashlib.sha256()
        for name, tensor in self.state():
            total.update(name.encode() + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return total.hexdigest()


def drawn_groups(source: Path) -> list[Group]:
    """Return groups of the mixed prompts, with drawn completions and advantages."""
    rng = np.random.default_rng(5)
    groups = []
    for prompt in mixed_prompts(source):
        rows = [rng.integers(0, 400, n).astype(np.int64) for n in (3, 7)]
        completions = tuple(Completion(ids, np.zeros(len(ids), np.float32), "length", "") for ids in rows)
        groups.append(Group(prompt, completions, (), rng.standard_normal(2).astype(np.float32)))
    return groups


def sound(source: Path, mesh: Mesh, dtype: torch.dtype, frozen: bool, iterations: int) -> list[float]:
    """Take steps that nobody disturbs, with a check before and after each; return their gradient norms."""
    trainer = Trainer(source, mesh, dtype, frozen, iterations)
    norms = []
    for _ in range(5):
        trainer.updater.replicas.check(state=True, always=True)
        norms.append(trainer.step()["train/grad_norm"])
        trainer.updater.replicas.check()
    return norms


def damaged(source: Path, mesh: Mesh, dtype: torch.dtype, what: str, rank: int) -> dict[str, Any]:
    """Flip one bit on one rank right after a step, and begin the next one."""
    trainer = Trainer(source, mesh, dtype)
    for _ in range(2):
        trainer.step()
    if mesh.rank == rank:
        name, tensor = next(item for item in targets(trainer) if item[0].startswith(what))
        words = tensor.detach().view(-1).view(torch.int16 if tensor.element_size() == 2 else torch.int32)
        words[len(words) // 2] ^= 1  # the least of all changes
    before = trainer.digest()
    try:
        trainer.step()
    except RunStopped as stopped:
        return {"code": stopped.code, "reason": stopped.reason, "same": trainer.digest() == before}
    return {"code": 0}


def targets(trainer: Trainer) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what can be damaged, by name."""
    for chunk in trainer.policy.chunks:
        yield from ((f"parameter {name}", parameter) for name, parameter in chunk.named_parameters())
    yield from trainer.updater.replicas._optimizer_state()


def bad_steps(source: Path, mesh: Mesh, kind: str) -> dict[str, Any]:
    """Take a good step and three that are not finite on rank 1; return what changed, by hashes."""
    trainer = Trainer(source, mesh, FP32)
    trainer.step()
    update, bad = trainer.updater, mesh.rank == 1
    batches = update.micro_batches(trainer._update._prepare(trainer.groups)[0])
    if kind == "gradient" and bad:
        weight = trainer.policy.model.language.decoder.layers[0].mlp.linear_fc2.weight  # split over tensor ranks
        weight.register_hook(lambda gradient: gradient * float("nan"))
    nan = float("nan") if bad else 1.0
    loss = _loss(trainer.policy, nan if kind == "loss" else 1.0, nan if kind == "only the loss" else 1.0)
    hashes, skipped, code = [trainer.digest()], [], 0
    try:
        for _ in range(3):
            skipped.append(update.step(batches, loss, 1e-3)[1]["train/skipped"])
            hashes.append(trainer.digest())
    except RunStopped as stopped:
        code = stopped.code
        hashes.append(trainer.digest())
    return {"hashes": hashes, "skipped": skipped, "code": code}


def _loss(
    policy: Any, factor: float, told: float
) -> Callable[[torch.Tensor, MicroBatch], tuple[torch.Tensor, dict[str, Any]]]:
    def loss(hidden: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, Any]]:
        values, _ = policy.logprobs(hidden, *label_tensors(batch))
        return values.mean() * factor, {"loss": values.detach().mean() * told}

    return loss
