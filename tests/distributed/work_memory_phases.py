"""What ranks do in tests of offloading and of overlapped collectives: the same steps, each in another way."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_vlmr1 import config
from megatron_vlmr1.checkpoint import state
from megatron_vlmr1.grpo.update import GrpoUpdate, Updater
from megatron_vlmr1.parallel import optimizer as parallel_optimizer
from megatron_vlmr1.parallel.mesh import Mesh
from megatron_vlmr1.parallel.overlap import DataParallel
from megatron_vlmr1.runtime import device
from tests.checkpoints import mixed_prompts
from tests.distributed import work
from tests.distributed.ranks import layout
from tests.distributed.work_replicas import Trainer, drawn_groups

STEPS = 3
BUCKET = 20_000  # of some 150,000 parameters
REDUCE: dict[str, Any] = {"overlap_grad_reduce": True}
BOTH: dict[str, Any] = {**REDUCE, "overlap_param_gather": True}
BUCKETS: dict[str, Any] = {**BOTH, "bucket_size": BUCKET}
# what `parallel` says, and whether buckets wait until backward is done
WAYS = {
    "plain": ({}, False),
    "both": (BOTH, False),
    "buckets": (BUCKETS, False),
    "buckets at the end": ({**REDUCE, "bucket_size": BUCKET}, True),
}
STAGES = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}


class Offloading(Trainer):
    """A policy in training whose state may be away; images only on the first data-parallel rank if `lopsided`."""

    def __init__(self, source: Path, mesh: Mesh, dtype: str, sections: dict[str, Any], lopsided: bool = False) -> None:
        self.mesh = mesh
        cfg = work.settings(precision=dtype, **{"grpo": {"beta": 0.0}, **sections})
        self.policy = work.load_policy(source, mesh, dtype=device.DTYPES[dtype])
        self.optimizer = parallel_optimizer.build(cfg.optimizer, self.policy.wrap_for_training())
        self.updater = Updater(self.policy, self.optimizer, cfg)
        self._update = GrpoUpdate(self.updater, None)
        groups = drawn_groups(source)
        self.groups = work.share(groups, mesh)
        if lopsided:
            self.groups = [g for g in groups if bool(g.prompt.images) == (mesh.dp_rank == 0)]

    def digest(self) -> str:
        """Return a sha256 of parameters and optimizer state, wherever that is and in whatever order."""
        self.policy.settle()
        self.updater.offload.before_step()
        parts = sorted(
            hashlib.sha256(name.encode() + copy.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).digest()
            for name, copy in ((name, tensor.to("cpu", copy=True)) for name, tensor in self.state())
        )
        return hashlib.sha256(b"".join(parts)).hexdigest()


def overlapped(root: Path, ways: list[str], **sizes: int) -> None:
    """Take the same steps in each of `ways`; write digests, metrics, and how many buckets went before the end."""
    seen: dict[str, Any] = {}
    for way in ways:
        overlap, late = WAYS[way]
        with layout(config.ParallelConfig(**overlap, **sizes)) as mesh:
            sections = {"grpo": {"beta": 0.0, "num_iterations": 2}, "train": {"micro_batch_tokens": work.SMALL}}
            trainer = Offloading(root / "untied", mesh, "fp32", sections, lopsided=True)
            if late:
                for chunk in trainer.policy.ddp:
                    chunk._ready = lambda _: None  # type: ignore[method-assign]
            early: list[int] = []
            norms = [_step(trainer, early) for _ in range(STEPS)]
            gathering = trainer.policy._gathering
            buckets = [len(chunk.bucket_groups) for chunk in trainer.policy.ddp]
            facts = {"early": early, "norms": norms, "buckets": buckets, "gathering": gathering}
            seen[way] = {"digest": trainer.digest(), **facts}
            rank = mesh.rank
    (root / f"overlapped_{rank}.json").write_text(json.dumps(seen))


def _step(trainer: Offloading, early: list[int]) -> float:
    """Take a step, and note how many buckets were on their way when backward was done."""
    original = DataParallel.finish_grad_sync

    def finish(self: Any, force_all_reduce: bool | None = False) -> None:
        early.append(sum(group.grad_reduce_handle is not None for group in self.bucket_groups))
        original(self, force_all_reduce)

    DataParallel.finish_grad_sync = finish  # type: ignore[method-assign]
    try:
        return trainer.step()["train/grad_norm"]
    finally:
        DataParallel.finish_grad_sync = original  # type: ignore[method-assign]


def offloaded(root: Path) -> None:
    """Take steps with generation between them, in each type and with each place of the state."""
    seen: dict[str, Any] = {}
    for dtype in ("fp32", "bf16"):
        for when in ("none", "rollout", "always"):
            with layout("dp2") as mesh:
                seen[f"{dtype} {when}"] = _offloaded(root, mesh, dtype, when)
                rank = mesh.rank
    (root / f"offloaded_{rank}.json").write_text(json.dumps(seen))


def _offloaded(root: Path, mesh: Mesh, dtype: str, when: str) -> dict[str, Any]:
    sections = {"optimizer": {"offload": when}}
    trainer = Offloading(root / "untied", mesh, dtype, sections)
    offload, out = trainer.updater.offload, root / f"offload_{dtype}_{when}"
    if mesh.rank == 0:
        (out / "state").mkdir(parents=True)
    dist.barrier()
    held: dict[str, Any] = {"before": _bytes(trainer)}
    for _ in range(2):
        offload.before_generation()
        held["rollout"] = _bytes(trainer)
        work.generate(trainer.policy, mixed_prompts(root / "untied")[:1], greedy=True)
        trainer.step()
        held["after"] = _bytes(trainer)
    offload.before_generation()  # an evaluation, and a save right behind it
    trainer.updater.check_state(always=True)
    state.save(trainer.policy, trainer.optimizer, {"step": 2}, out / "state", "dp_reshardable")
    work.write_weights(trainer.policy, root / "untied", out / "hf")
    offload.after_step()
    straight = [trainer.step()["train/grad_norm"] for _ in range(2)]
    resumed = Offloading(out / "hf", mesh, dtype, sections)
    resumed.groups = trainer.groups
    state.load(resumed.policy, resumed.optimizer, out / "state")
    resumed.updater.replicas.remember()
    resumed.updater.offload.before_generation()
    again = [resumed.step()["train/grad_norm"] for _ in range(2)]
    digests = {"digest": trainer.digest(), "resumed": resumed.digest(), "host": offload.host_bytes}
    return {"straight": straight, "again": again, "held": held, **digests}


def _bytes(trainer: Offloading) -> dict[str, int]:
    """Return the memory of gradients, and of optimizer state that is not the parameters themselves."""
    buffers = [buffer for chunk in trainer.policy.ddp for buffer in chunk.buffers]
    parameters = {buffer.param_data.untyped_storage()._cdata for buffer in buffers}
    stored = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for _, t in trainer.state() if t.dim()}
    stored = {key: size for key, size in stored.items() if key not in parameters}
    mine = {id(p): p.untyped_storage()._cdata for p in trainer.policy.parameters()}
    state_bytes = sum(size for key, size in stored.items() if key not in set(mine.values()))
    return {"gradients": sum(b.grad_data.untyped_storage().nbytes() for b in buffers), "state": state_bytes}


def other_buckets(root: Path) -> None:
    """Save in both formats with many buckets; go on without them from the one that any layout may load."""
    with layout(config.ParallelConfig(**BUCKETS)) as mesh:
        rank, saved = mesh.rank, root / "many_buckets"
        trainer = Offloading(root / "untied", mesh, "fp32", {})
        trainer.step()
        progress = {"config": {"parallel": mesh.layout.model_dump(mode="json")}}
        for kind in state.FORMATS:
            if rank == 0:
                (saved / kind).mkdir(parents=True)
            dist.barrier()
            state.save(trainer.policy, trainer.optimizer, progress, saved / kind, kind)
        work.write_weights(trainer.policy, root / "untied", saved / "hf")
        norms = {"straight": [trainer.step()["train/grad_norm"] for _ in range(2)]}
    with layout("dp2") as mesh:
        trainer = Offloading(saved / "hf", mesh, "fp32", {})
        try:
            state.load(trainer.policy, trainer.optimizer, saved / "dp_reshardable")
        except ValueError as error:
            refused = str(error)
        state.load(trainer.policy, trainer.optimizer, saved / "fully_reshardable")
        trainer.updater.replicas.remember()
        norms["resumed"] = [trainer.step()["train/grad_norm"] for _ in range(2)]
    (root / f"other_buckets_{rank}.json").write_text(json.dumps({"refused": refused, **norms}))


def one_copy(root: Path) -> None:
    """Go on alone from what two data-parallel ranks saved of their own parts of many buckets."""
    with layout(config.ParallelConfig(**BUCKETS)) as mesh:
        trainer = Offloading(root / "many_buckets" / "hf", mesh, "fp32", {})
        state.load(trainer.policy, trainer.optimizer, root / "many_buckets" / "dp_reshardable")
        norms = [trainer.step()["train/grad_norm"] for _ in range(2)]
    (root / "one_copy.json").write_text(json.dumps(norms))


def everything(root: Path) -> None:
    """All that two ranks do, in one job."""
    torch.set_num_threads(1)
    overlapped(root, list(WAYS))
    offloaded(root)
    other_buckets(root)
