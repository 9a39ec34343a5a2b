"""What two ranks do in tests of decoding copies: every training layout into every layout for generation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_vlmr1.checkpoint import weights
from megatron_vlmr1.config import ParallelConfig
from megatron_vlmr1.models.policy import Policy
from megatron_vlmr1.parallel.mesh import Mesh, building_for
from megatron_vlmr1.rollout.decoding_copy import CopyEngine
from megatron_vlmr1.rollout.sampling import Sampling
from megatron_vlmr1.types import IntArray
from tests.capture import Checked
from tests.checkpoints import banned_ids, mixed_prompts
from tests.distributed import work
from tests.distributed.ranks import layout

DECODING = {
    "alone": ParallelConfig(),
    "tensor": ParallelConfig(tensor_model_parallel_size=2),
    "pipeline": ParallelConfig(pipeline_model_parallel_size=2, pipeline_layers=[3, 1]),
}
TRAINING = ("tp2", "pp2", "pp2_vp2", "tp2_sp")
SAMPLING = Sampling(work.MAX_NEW_TOKENS, work.STOPS, seed=3, temperature=1.3)
WAYS = (SAMPLING, replace(SAMPLING, greedy=True), replace(SAMPLING, top_k=40, top_p=0.9, repetition_penalty=1.3))


def everything(root: Path) -> None:
    """All pairs of layouts, on every kind of checkpoint."""
    for training in TRAINING:
        with layout(training) as mesh:
            for which in ("untied", "tied", "one_kv_head", "odd"):
                policy = work.load_policy(root / which, mesh)
                for name, decoding in DECODING.items():
                    seen = one_copy(policy, decoding, root / which, mesh)
                    (root / f"copy_{training}_{name}_{which}_{mesh.rank}.json").write_text(json.dumps(seen))
                    if (training, name) == ("pp2", "tensor") and which in ("odd", "one_kv_head"):
                        bursts_like_ticks(policy, decoding, root / which)
    with layout("dp2") as mesh:
        policy = work.load_policy(root / "untied", mesh)
        try:
            engine_of(policy, DECODING["tensor"], root / "untied")
        except ValueError as error:
            (root / f"copy_refused_{mesh.rank}.txt").write_text(str(error))


def engine_of(policy: Policy, decoding: ParallelConfig, source: Path, burst: int = 1) -> CopyEngine:
    """Return an engine on a copy of the policy."""

    def text(ids: IntArray) -> str:
        return " ".join(map(str, ids))

    return CopyEngine(policy, decoding, banned_ids(source), text, 10_000, 100, burst, Checked)


def one_copy(policy: Policy, decoding: ParallelConfig, source: Path, mesh: Mesh) -> dict[str, object]:
    """Generate with a copy; compare its weights with what the checkpoint's reader would load there."""
    engine = engine_of(policy, decoding, source)
    if not policy.ddp:
        policy.wrap_for_training()  # moves the values that the copy has to follow
    prompts = mixed_prompts(source)
    empty = engine.weights_bytes
    told: list[tuple[int, int]] = []
    rows = engine.generate(prompts, work.GENERATIONS, SAMPLING, lambda i, j, c: told.append((i, j)))
    with building_for(engine.policy.mesh):
        fresh = Policy(policy.shape, engine.policy.mesh, torch.float32, [])
    weights.load(fresh.chunks, weights.HfWeights(source))
    pairs = list(zip(engine.policy.parameters(), fresh.parameters(), strict=True))
    same = [bool(torch.equal(a, b)) for a, b in pairs]
    full = engine.weights_bytes
    again = engine.generate(prompts[:1], 1, Sampling(3, frozenset(), greedy=True))
    with torch.no_grad():  # as an optimizer step would
        for parameter in policy.parameters():
            parameter.mul_(-1.0)
    stale = engine.generate(prompts[:1], 1, Sampling(3, frozenset(), greedy=True))
    policy.weights_changed(tower=True)
    engine.generate(prompts[:1], 1, Sampling(3, frozenset(), greedy=True))
    followed = [bool(torch.equal(a, -b)) for a, b in pairs]
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(-1.0)
    policy.weights_changed(tower=True)
    engine.release()
    dist.barrier()
    return {
        "rows": [
            [
                [c.token_ids.tolist(), c.logprobs.tolist(), c.drawn_logprobs.tolist(), c.text, c.finish_reason]
                for c in row
            ]
            for row in rows
        ],  # type: ignore[union-attr]  # noqa: E501
        "told": sorted(told),
        "speaks": engine.speaks,
        "bytes": [empty, full, engine.weights_bytes],
        "expected_bytes": sum(p.numel() * 4 for p in fresh.parameters()),
        "same": same,
        "followed": followed,
        "unchanged_without_notice": again[0][0].token_ids.tolist() == stale[0][0].token_ids.tolist(),
    }


def bursts_like_ticks(policy: Policy, decoding: ParallelConfig, source: Path) -> None:
    """Generate tick by tick and in bursts on two copies, whose weights are freed and lie elsewhere in between."""
    prompts = mixed_prompts(source)
    by_ticks, in_bursts = engine_of(policy, decoding, source), engine_of(policy, decoding, source, burst=4)
    for sampling in WAYS:
        expected = by_ticks.generate(prompts, 2, sampling)
        for again in range(2):
            found = in_bursts.generate(prompts, 2, sampling)
            for row, other in zip(found, expected, strict=True):
                for a, b in zip(row, other, strict=True):
                    assert a.token_ids.tolist() == b.token_ids.tolist() and a.finish_reason == b.finish_reason
                    assert np.abs(a.logprobs - b.logprobs).max() <= 1e-5
                    assert np.abs(a.drawn_logprobs - b.drawn_logprobs).max() <= 1e-5
            if again:
                in_bursts.release()
                assert in_bursts.steps is None and in_bursts.weights_bytes == 0
            else:
                assert in_bursts.steps is not None
    by_ticks.release()
