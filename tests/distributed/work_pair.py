"""What a pair of ranks does in tests: vocabulary, finite check, training state."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from megatron_vlmr1.checkpoint import state
from megatron_vlmr1.data.packing import MicroBatch, PackedGroup
from megatron_vlmr1.errors import RunStopped
from megatron_vlmr1.grpo.update import GrpoUpdate, Updater
from megatron_vlmr1.models.logprobs import Vocabulary, token_logprobs
from megatron_vlmr1.parallel import optimizer as parallel_optimizer
from megatron_vlmr1.parallel.mesh import Mesh
from megatron_vlmr1.rollout.sampling import Sampling, choose
from tests.checkpoints import mixed_prompts
from tests.distributed import work
from tests.distributed.ranks import layout


def everything(root: Path) -> None:
    """All of it in one job."""
    with layout("tp2") as mesh:
        vocabulary(root, mesh)
    for name in ("tp2", "pp2", "pp2_vp2", "dp2"):
        with layout(name) as mesh:
            finite_check(root, name, mesh)
    for name in ("dp2", "pp2", "pp2_vp2", "tp2_sp"):
        with layout(name) as mesh:
            lopsided(root, name, mesh)
    for name, which in (("tp2", "untied"), ("dp2", "untied"), ("pp2", "tied"), ("pp2_vp2", "tied")):
        with layout(name) as mesh:
            save_and_restore(root, name, root / which, mesh)
    with layout("dp2") as mesh:
        other_layout(root, root / "state_tp2", root / "untied", mesh)


def vocabulary(root: Path, mesh: Mesh) -> None:
    """Log-probs with their gradients, and choices, on this rank's half of the vocabulary in ``vocabulary_in``."""
    given = load_file(root / "vocabulary_in.safetensors")
    facts = json.loads((root / "vocabulary_in.json").read_text())
    rows = -(-facts["size"] // mesh.tp_size)
    mine = slice(mesh.tp_rank * rows, (mesh.tp_rank + 1) * rows)
    part = Vocabulary(rows, facts["size"], facts["banned"], mesh.tp_group, torch.device("cpu"))
    hidden, weight = given["hidden"].requires_grad_(), given["weight"][mine].clone().requires_grad_()
    logprobs, entropy = token_logprobs(hidden, weight, given["labels"], part)
    (logprobs * given["upstream"]).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    out = {"logprobs": logprobs.detach(), "entropy": entropy, "d_hidden": hidden.grad, "d_weight": weight.grad}
    with torch.no_grad():
        logits = part.logits(hidden, weight)
        for name, sampling in samplings().items():
            random = None if sampling.greedy else given["random"]
            seen = given["seen"][:, mine]
            for field, value in choose(logits, part, sampling, random, seen)._asdict().items():
                out[f"{name}_{field}"] = value.clone()
    save_file(out, root / f"vocabulary_{mesh.tp_rank}.safetensors")


def samplings() -> dict[str, Sampling]:
    """Ways to choose a token."""
    return {
        "greedy": Sampling(1, frozenset(), greedy=True),
        "drawn": Sampling(1, frozenset()),
        "cold": Sampling(1, frozenset(), temperature=0.5),
        "filtered": Sampling(
            1, frozenset(), temperature=1.5, repetition_penalty=1.3, top_k=100, top_p=0.8, min_p=0.005
        ),
        "penalised": Sampling(1, frozenset(), greedy=True, repetition_penalty=1.3),
    }


def lopsided(root: Path, name: str, mesh: Mesh) -> None:
    """Gradients where one data-parallel rank has all groups and the other none; then metrics where nobody has any."""
    policy, reference = work.with_reference(root / "untied", root / "untied_reference", mesh)
    policy.wrap_for_training()
    groups = work.replayed_groups(root / "untied", root / "one" / "sampled_0.json")
    update = work.still_update(policy, reference, work.LARGE)
    metrics = [update(groups if mesh.dp_rank == 0 else [], 0.0)]
    work.write_gradients(policy, root / "untied", root / f"lopsided_{name}")
    metrics.append(update([], 0.0))
    (root / f"lopsided_{name}_{mesh.rank}.json").write_text(json.dumps(metrics))


def finite_check(root: Path, name: str, mesh: Mesh) -> None:
    """Steps of which some have a NaN in the loss of rank 1 only; write what each rank saw."""
    policy = work.load_policy(root / "untied", mesh)
    cfg = work.settings()
    ddp = policy.wrap_for_training()
    updater = Updater(policy, parallel_optimizer.build(cfg.optimizer, ddp), cfg)
    completions = work.read_completions(root / "one" / "sampled_0.json")
    groups = [
        PackedGroup(p, tuple(c.token_ids for c in completions[p.position]), (0, 1, 2, 3))
        for p in work.share(mixed_prompts(root / "untied"), mesh)
    ]
    batches = updater.micro_batches(groups)
    seen: dict[str, Any] = {"metrics": [], "changed": [], "verdicts": []}
    for injected in (None, 0, 1):
        for chunk in ddp:
            chunk.zero_grad_buffer()
        if injected == mesh.rank:
            ddp[-1].buffers[-1].grad_data[-1] = float("nan")
        seen["verdicts"].append(parallel_optimizer.gradients_finite(ddp))
    try:
        for bad in (False, True, True, False, True, True, True):
            before = [p.detach().clone() for p in policy.parameters()]
            _, metrics = updater.step(batches, _loss(policy, bad and mesh.rank == 1), 1e-3)
            seen["metrics"].append(metrics)
            changed = [not torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True)]
            seen["changed"].append(sum(changed))
    except RunStopped as error:
        seen |= {"code": error.code, "reason": error.reason}
        seen["same"] = all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))
    seen["parameters"] = len(before)
    (root / f"finite_{name}_{mesh.rank}.json").write_text(json.dumps(seen))


def _loss(policy: Any, bad: bool) -> Callable[[torch.Tensor, MicroBatch], tuple[torch.Tensor, dict[str, Any]]]:
    def loss(hidden: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, Any]]:
        values, _ = policy.logprobs(hidden, torch.from_numpy(batch.label_rows), torch.from_numpy(batch.label_ids))
        return values.mean() * (float("nan") if bad else 1.0), {}

    return loss


class _Trainer:
    """A policy in training, as the training loop builds it."""

    def __init__(self, root: Path, weights: Path, mesh: Mesh) -> None:
        self.mesh, self.weights = mesh, weights
        self.policy = work.load_policy(weights, mesh)
        cfg = work.settings()
        cfg = cfg.model_copy(update={"grpo": cfg.grpo.model_copy(update={"beta": 0.0})})
        self.optimizer = parallel_optimizer.build(cfg.optimizer, self.policy.wrap_for_training())
        self.update = GrpoUpdate(Updater(self.policy, self.optimizer, cfg), None)
        groups = work.replayed_groups(root / "untied", root / "one" / "sampled_0.json")
        self.groups = work.share(groups, mesh)

    def steps(self, n: int) -> list[dict[str, float]]:
        """Take `n` steps."""
        return [self.update(self.groups, work.LEARNING_RATE) for _ in range(n)]


def save_and_restore(root: Path, name: str, source: Path, mesh: Mesh) -> None:
    """Two steps, save, two more; then two from what was saved, in new objects."""
    out = root / f"state_{name}"
    if mesh.rank == 0:
        (out / "state").mkdir(parents=True)
    dist.barrier()
    straight = _Trainer(root, source, mesh)
    straight.steps(2)
    torch.manual_seed(100 + mesh.rank)
    progress = {"step": 2, "consumed_samples": 12, "note": "x"}
    state.save(straight.policy, straight.optimizer, progress, out / "state")
    expected = torch.rand(3)
    work.write_weights(straight.policy, source, out / "hf")
    metrics = {"straight": straight.steps(2)}
    work.write_weights(straight.policy, source, out / "straight")
    resumed = _Trainer(root, out / "hf", mesh)
    torch.manual_seed(0)
    loaded = state.load(resumed.policy, resumed.optimizer, out / "state")
    facts = {"progress": loaded == progress, "generator": torch.equal(torch.rand(3), expected)}
    metrics["resumed"] = resumed.steps(2)
    work.write_weights(resumed.policy, source, out / "resumed")
    (out / f"seen_{mesh.rank}.json").write_text(json.dumps({**metrics, **facts}))


def other_layout(root: Path, saved: Path, source: Path, mesh: Mesh) -> None:
    """Load on data-parallel ranks what tensor-parallel ranks saved; save it again, then go on."""
    trainer = _Trainer(root, saved / "hf", mesh)
    state.load(trainer.policy, trainer.optimizer, saved / "state")
    again = root / "state_again"
    if mesh.rank == 0:
        again.mkdir()
    dist.barrier()
    state.save(trainer.policy, trainer.optimizer, {}, again)
    metrics = trainer.steps(2)
    work.write_weights(trainer.policy, source, root / "state_other")
    if mesh.rank == 0:
        (root / "state_other.json").write_text(json.dumps(metrics))
