"""What a step's scores say: metrics over all ranks, and samples for people to read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_vlmr1.errors import STOPPED, RunStopped
from megatron_vlmr1.grpo.advantages import scores_differ
from megatron_vlmr1.grpo.shaping import OVERLONG
from megatron_vlmr1.parallel import reduce
from megatron_vlmr1.runtime import distributed
from megatron_vlmr1.telemetry.samples import write_samples
from megatron_vlmr1.train.run import Run
from megatron_vlmr1.types import Group


def score_metrics(groups: Sequence[Group], run: Run) -> dict[str, float]:
    """Return `reward/*`, `rollout/*` and `grpo/zero_std_groups` over all ranks and all groups that were drawn.

    `reward/mean` and `reward/std` are of what is compared, the overlong penalty included; `grpo/zero_std_groups` is the
    share of groups without two unlike scores.

    Raises:
        RunStopped: too large a share of the scores failed (exit code 17).
    """
    names = sorted(run.judges.weights) + [OVERLONG] * bool(run.cfg.grpo.overlong_buffer_tokens)
    sums = dict.fromkeys(("n", "scored", "value", "square", "length", "truncated", "zero_std", "groups", *names), 0.0)
    for group in groups:
        sums["groups"] += 1
        sums["zero_std"] += not scores_differ(group)
        for completion, score in zip(group.completions, group.scores, strict=True):
            sums["n"] += 1
            sums["length"] += len(completion.token_ids)
            sums["truncated"] += completion.finish_reason == "length"
            if score.value is not None:
                sums["scored"] += 1
                sums["value"] += score.value
                sums["square"] += score.value**2
                for name in names:
                    sums[name] += score.parts[name]
    sums = reduce.sums(
        sums | {"skipped": float(run.feed.skipped), "ledger": float(run.feed.unwritten)}, run.mesh.is_model_leader
    )
    n, scored = max(1.0, sums["n"]), max(1.0, sums["scored"])
    failed = 1.0 - sums["scored"] / n if sums["n"] else 0.0
    if failed > run.cfg.rewards.max_failed_frac:
        told = distributed.first_told(run.judges.first_failure(groups))
        raise RunStopped(STOPPED, f"{failed:.0%} of the scores of a step failed; the first: {told}")
    mean = sums["value"] / scored
    return {
        "reward/mean": mean,
        "reward/std": max(0.0, sums["square"] / scored - mean**2) ** 0.5,
        **{f"reward/{name}": sums[name] / scored for name in names},
        "reward/failed_frac": failed,
        "grpo/zero_std_groups": sums["zero_std"] / max(1.0, sums["groups"]),
        "rollout/length_mean": sums["length"] / n,
        "rollout/truncated_frac": sums["truncated"] / n,
        "rollout/tokens": sums["length"],
        "data/skipped": sums["skipped"],
        "data/ledger_unwritten": sums["ledger"],
        **run.judges.take_metrics(),
    }


def save_samples(groups: Sequence[Group], step: int, run: Run) -> None:
    """Write the first rank's groups for people to read, every `train.sample_every` steps."""
    every = run.cfg.train.sample_every
    if run.mesh.rank != 0 or not every or step % every:
        return
    rows = []
    for group in groups:
        assert group.advantages is not None
        completions = [
            {
                "text": completion.text,
                "value": score.value,
                "parts": dict(score.parts),
                "failure": score.failure,
                "advantage": float(advantage) if np.isfinite(advantage) else None,
                "finish_reason": completion.finish_reason,
            }
            for completion, score, advantage in zip(group.completions, group.scores, group.advantages, strict=True)
        ]
        prompt = group.prompt
        rows.append({"key": prompt.key, "question": prompt.question, "truth": prompt.truth, "completions": completions})
    write_samples(run.run_dir, step, rows)
