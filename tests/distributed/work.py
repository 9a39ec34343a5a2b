"""What ranks do in tests: each function writes its results as files, which the test compares."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from megatron_vlmr1 import config
from megatron_vlmr1.checkpoint import weights, writer
from megatron_vlmr1.checkpoint.weights import parameter_pieces
from megatron_vlmr1.data.packing import MicroBatch, PackedGroup, model_input, pack
from megatron_vlmr1.grpo.reference import Reference
from megatron_vlmr1.grpo.update import GrpoUpdate, Updater
from megatron_vlmr1.models.families import read_shape
from megatron_vlmr1.models.policy import Policy
from megatron_vlmr1.models.vlm import gather_hidden
from megatron_vlmr1.parallel import optimizer as parallel_optimizer
from megatron_vlmr1.parallel import schedule
from megatron_vlmr1.parallel.mesh import Mesh
from megatron_vlmr1.rollout.engine import Engine
from megatron_vlmr1.rollout.sampling import Sampling
from megatron_vlmr1.types import Completion, Group, Prompt
from tests.checkpoints import banned_ids, mixed_prompts
from tests.distributed.ranks import REPLAYED, TWO_RANKS, layout

GENERATIONS = 4
MAX_NEW_TOKENS = 10
LEARNING_RATE = 7e-4  # the quickstart's
STEPS = 10
STOPS = frozenset(range(5, 512, 16))
SMALL, LARGE = 40, 10_000  # tokens of a micro-batch: one group each, long ones cut; and everything mixed


def settings(micro_batch_tokens: int = LARGE, **sections: Any) -> config.Config:
    """Return a GRPO config in fp32."""
    return config.parse(
        {
            "precision": "fp32",
            "model": {"path": "-"},
            "data": {"train": "-"},
            "optimizer": {"lr": LEARNING_RATE},
            "train": {"micro_batch_tokens": micro_batch_tokens},
            **sections,
        },
        "test",
    )


def load_policy(
    directory: Path,
    mesh: Mesh,
    freeze_vision: bool = False,
    banned: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    recompute: config.RecomputeConfig | None = None,
) -> Policy:
    """Build the model of `directory`; `banned_ids` are its banned tokens unless others are given."""
    banned = banned_ids(directory) if banned is None else banned
    policy = Policy(read_shape(directory), mesh, dtype, banned, freeze_vision, recompute)
    weights.load(policy.chunks, weights.HfWeights(directory))
    return policy


def with_reference(
    directory: Path,
    reference: Path,
    mesh: Mesh,
    freeze_vision: bool = False,
    recompute: config.RecomputeConfig | None = None,
) -> tuple[Policy, Any]:
    """Build the policy and a reference that differs from it."""
    policy = load_policy(reference, mesh, freeze_vision, recompute=recompute)
    remembered = Reference(policy)
    weights.load(policy.chunks, weights.HfWeights(directory))
    return policy, remembered


def share(items: Sequence[Any], mesh: Mesh) -> list[Any]:
    """Return this data-parallel rank's items."""
    return list(items)[mesh.dp_rank :: mesh.dp_size]


def engine(policy: Policy, max_cache_tokens: int = 10_000) -> Engine:
    """Return an engine whose texts are the token ids in words."""
    return Engine(policy, lambda ids: " ".join(map(str, ids)), max_cache_tokens)


def generate(policy: Policy, prompts: Sequence[Prompt], greedy: bool) -> list[tuple[Completion, ...]]:
    """Generate on this layout."""
    sampling = Sampling(MAX_NEW_TOKENS, STOPS, greedy=greedy, seed=3)
    return engine(policy).generate(prompts, 1 if greedy else GENERATIONS, sampling)


def write_completions(path: Path, prompts: Sequence[Prompt], rows: Sequence[tuple[Completion, ...]]) -> None:
    """Write completions as JSON, by the positions of their prompts."""
    table = {
        str(prompt.position): [
            {"ids": c.token_ids.tolist(), "logprobs": c.logprobs.tolist(), "reason": c.finish_reason, "text": c.text}
            for c in row
        ]
        for prompt, row in zip(prompts, rows, strict=True)
    }
    path.write_text(json.dumps(table))


def read_completions(path: Path) -> dict[int, tuple[Completion, ...]]:
    """Read what `write_completions` wrote."""
    return {
        int(position): tuple(
            Completion(np.array(c["ids"], np.int64), np.array(c["logprobs"], np.float32), c["reason"], c["text"])
            for c in row
        )
        for position, row in json.loads(path.read_text()).items()
    }


def replayed_groups(directory: Path, rollout: Path) -> list[Group]:
    """Return groups of a saved rollout with drawn advantages, a failed score and completions of one token."""
    completions = read_completions(rollout)
    rng = np.random.default_rng(11)
    groups = []
    for prompt in mixed_prompts(directory):
        row = list(completions[prompt.position])
        advantages = rng.standard_normal(len(row)).astype(np.float32)
        if prompt.position in (0, 3):
            row[1] = replace(row[1], token_ids=row[1].token_ids[:1], logprobs=row[1].logprobs[:1])
        if prompt.position in (2, 3):
            advantages[2] = np.nan
        groups.append(Group(prompt, tuple(row), (), advantages))
    return groups


@torch.no_grad()
def logits(policy: Policy, prompts: Sequence[Prompt], target: Path) -> None:
    """Write the logits [T, vocabulary] of each prompt, all packed in one row; the last stage's first rank writes."""
    mesh = policy.mesh
    batch = pack([PackedGroup(p, (), ()) for p in prompts], policy.shape.image_token_id, mesh.tp_size)
    found: list[torch.Tensor] = []

    def keep(hidden: torch.Tensor, _: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        found.append(policy.vocabulary.logits(gather_hidden(policy.chunks[-1], hidden), policy.output_weight()))
        return hidden.new_zeros(()), {}

    def forward(model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
        return model(model_input(batch, policy))

    schedule.run(policy.chunks, [batch] * mesh.pp_size, forward, keep, mesh, forward_only=True)
    if not found:
        return
    local = found[0]
    parts = [torch.empty_like(local) for _ in range(mesh.tp_size)]
    dist.all_gather(parts, local, group=mesh.tp_group)
    if mesh.tp_rank == 0 and mesh.dp_rank == 0:
        whole = torch.cat(parts, dim=1)[: sum(len(p.token_ids) for p in prompts), : policy.shape.text.vocab_size]
        rows = whole.split([len(p.token_ids) for p in prompts])
        save_file({str(p.position): row.contiguous() for p, row in zip(prompts, rows, strict=True)}, target)


def write_gradients(policy: Policy, source: Path, target: Path) -> None:
    """Write the gradients of the step as a Hugging Face directory, through the checkpoint's own writer."""
    mesh = policy.mesh
    assert policy.ddp
    for buffer in (buffer for chunk in policy.ddp for buffer in chunk.buffers):
        for bucket in buffer.buckets:  # each data-parallel rank holds the sum of its part only
            part = bucket.grad_data.chunk(mesh.dp_size)[mesh.dp_rank].clone()
            parts = [torch.empty_like(part) for _ in range(mesh.dp_size)]
            dist.all_gather(parts, part, group=mesh.dp_group)
            bucket.grad_data.copy_(torch.cat(parts))
    values = [p.data for p in policy.parameters()]
    for parameter in policy.parameters():
        gradient = getattr(parameter, "main_grad", None)
        parameter.data = torch.zeros_like(parameter.data) if gradient is None else gradient.detach().clone()
    for chunk in policy.chunks:
        for _, parameter, pieces in parameter_pieces(chunk):
            offset = 0
            for piece in pieces[mesh.tp_rank]:
                window = parameter.data.narrow(piece.dim, offset, piece.stop - piece.start)
                assert piece.name is not None or not window.any(), "padding has a gradient"
                offset += piece.stop - piece.start
    write_weights(policy, source, target)
    for parameter, value in zip(policy.parameters(), values, strict=True):
        parameter.data = value


def write_weights(policy: Policy, source: Path, target: Path) -> None:
    """Write the model as it is."""
    if policy.mesh.rank == 0:
        target.mkdir(parents=True)
    dist.barrier()
    writer.save(policy.chunks, source, target)


class Still:
    """Takes the place of the optimizer where only gradients are wanted."""

    def __init__(self) -> None:
        self.param_groups: list[dict[str, Any]] = []
        self.chained_optimizers: list[Any] = []

    def zero_grad(self) -> None:
        """Nothing is kept here."""

    def step(self) -> tuple[bool, float, None]:
        """Leave everything as it is."""
        return True, 0.0, None


def still_update(policy: Policy, reference: Any, micro_batch_tokens: int) -> GrpoUpdate:
    """Return an update that computes gradients and changes nothing."""
    return GrpoUpdate(Updater(policy, Still(), settings(micro_batch_tokens)), reference)  # type: ignore[arg-type]


def all_checks(root: Path, name: str, mesh: Mesh) -> None:
    """Logits, gradients, generation and ten steps on one layout; results under ``root/name``."""
    out = root / name
    out.mkdir(exist_ok=True)
    prompts = mixed_prompts(root / "untied")
    with torch.no_grad():
        for which in ("untied", "tied", "one_kv_head"):
            logits(load_policy(root / which, mesh, banned=[]), prompts, out / f"logits_{which}.safetensors")
        policy = load_policy(root / "untied", mesh)
        mine = share(prompts, mesh)
        for greedy in (True, False):
            path = out / f"{'greedy' if greedy else 'sampled'}_{mesh.dp_rank}.json"
            completions = generate(policy, mine, greedy)
            if mesh.is_model_leader:
                write_completions(path, mine, completions)
    groups = replayed_groups(root / "untied", root / "one" / "sampled_0.json")
    for which in ("untied", "tied", "one_kv_head"):
        gradient_checks(root, out, which, mesh, groups)
    if name in ("one", *REPLAYED):
        ten_steps(root, out / "untied", root / "untied", mesh, groups, frozen=False)
        ten_steps(root, out / "untied_frozen", root / "untied", mesh, groups, frozen=True)
    if name in ("one", "pp2", "pp2_vp2"):
        ten_steps(root, out / "tied", root / "tied", mesh, groups, frozen=False)


def gradient_checks(
    root: Path,
    out: Path,
    which: str,
    mesh: Mesh,
    groups: list[Group],
    recompute: config.RecomputeConfig | None = None,
) -> None:
    """Write the gradients of `groups` with small and with large micro-batches."""
    policy, reference = with_reference(root / which, root / f"{which}_reference", mesh, recompute=recompute)
    policy.wrap_for_training()
    for size in (SMALL, LARGE):
        metrics = still_update(policy, reference, size)(share(groups, mesh), 0.0)
        write_gradients(policy, root / which, out / f"gradients_{which}_{size}")
        if mesh.rank == 0:
            (out / f"gradients_{which}_{size}.json").write_text(json.dumps(metrics))


def ten_steps(root: Path, out: Path, source: Path, mesh: Mesh, groups: list[Group], frozen: bool) -> None:
    """Take ten optimizer steps on the same rollout; write the metrics of each and the weights after the last."""
    policy, reference = with_reference(source, root / f"{source.name}_reference", mesh, frozen)
    cfg = settings(100)
    optimizer = parallel_optimizer.build(cfg.optimizer, policy.wrap_for_training())
    update = GrpoUpdate(Updater(policy, optimizer, cfg), reference)
    metrics = [update(share(groups, mesh), LEARNING_RATE) for _ in range(STEPS)]
    write_weights(policy, source, out)
    if mesh.rank == 0:
        (out / "metrics.json").write_text(json.dumps(metrics))
    if policy.shape.text.tied and mesh.is_last_stage:
        weight = policy.chunks[-1].output_weight().detach().clone()
        save_file({"weight": weight}, out.with_name(f"{out.name}_output_layer.safetensors"))


def layouts(root: Path) -> None:
    """All checks on every layout of two ranks, one after another."""
    for name in TWO_RANKS:
        with layout(name) as mesh:
            all_checks(root, name, mesh)
