"""The rows about resuming on another layout (tensor, pipeline and data parallel sizes)."""

from __future__ import annotations

import itertools
import json
import shutil
from typing import Any, NamedTuple

from megatron_vlmr1.data.rollouts import read_rollout
from megatron_vlmr1.drill.field import Field
from megatron_vlmr1.drill.jobs import need, succeed
from megatron_vlmr1.telemetry.metrics import read_metrics

MOST_RANKS = 4
SAVED_STEP = 2
LOGPROB_LIMIT = 1e-5  # absolute
NORM_LIMIT = 1e-5  # relative


class Layout(NamedTuple):
    """Sizes of the three axes."""

    tp: int
    pp: int
    dp: int

    @property
    def ranks(self) -> int:
        """Ranks that it takes."""
        return self.tp * self.pp * self.dp

    @property
    def name(self) -> str:
        """Such as tp2_pp1_dp2."""
        return f"tp{self.tp}_pp{self.pp}_dp{self.dp}"

    @property
    def settings(self) -> dict[str, Any]:
        """The config's ``parallel`` for the tiny model of four layers."""
        uneven = {"pipeline_layers": [1, 2, 1]} if self.pp == 3 else {}
        return {"tensor_model_parallel_size": self.tp, "pipeline_model_parallel_size": self.pp, **uneven}


def layouts(ranks: int | None = None) -> list[Layout]:
    """Return all layouts of at most four ranks, or of exactly `ranks`, that the tiny model's four heads divide by."""
    sizes = range(1, MOST_RANKS + 1)
    every = (Layout(tp, pp, dp) for tp, pp, dp in itertools.product((1, 2, 4), sizes, sizes))
    return [layout for layout in every if layout.ranks <= MOST_RANKS and ranks in (None, layout.ranks)]


# One process has saved, others resume: for each of these pairs a `vlmr1 train` of its own.
_PAIRS = {
    Layout(2, 1, 1): (Layout(1, 1, 2), Layout(1, 2, 1)),
    Layout(1, 1, 2): (Layout(1, 1, 1), Layout(2, 1, 1)),
    Layout(1, 2, 1): (Layout(1, 1, 4), Layout(2, 2, 1)),
}


_TRAIN = {"prompts_per_step": 12, "save_every": SAVED_STEP, "steps": SAVED_STEP}
_LONGER = _TRAIN | {"steps": SAVED_STEP + 1}


def every_pair(field: Field) -> str:
    """Save on every layout, resume on every other one, in one job for each number of ranks, twice.

    The first job of so many ranks saves on each of its layouts, the second loads on each of them what all others saved.
    """
    root = field.root / "layouts"
    root.mkdir()
    config = field.config("layouts", debug={"replay_rollouts": str(root)}, train=_TRAIN, data={"workers": 0})
    for work in ("save", "resume"):
        for ranks in range(1, MOST_RANKS + 1):
            succeed(config, ranks, ("megatron_vlmr1.drill.pairs", work))
    found = [row for path in sorted(root.glob("pairs_*.json")) for row in json.loads(path.read_text())]
    count = len(layouts())
    need(len(found) == count * (count - 1), f"{len(found)} pairs instead of {count * (count - 1)}")
    wrong = [f"{row['pair']}: {', '.join(row['unlike'])}" for row in found if row["unlike"]]
    need(not wrong, f"{len(wrong)} pairs of {len(found)} have other bits: {'; '.join(wrong[:3])}")
    logprobs, norms = (max(found, key=lambda row: row[key]) for key in ("logprobs", "norm"))
    need(
        logprobs["logprobs"] <= LOGPROB_LIMIT,
        f"log-probs differ by {logprobs['logprobs']:.1e}: {logprobs['pair']}",
    )
    need(norms["norm"] <= NORM_LIMIT, f"gradient norms differ by {norms['norm']:.1e} ({norms['pair']})")
    tensors = {row["tensors"] for row in found}
    return (
        f"{len(found)} pairs of {count} layouts: {'/'.join(map(str, sorted(tensors)))} logical tensors bit-equal, same "
        f"samples, next log-probs within {logprobs['logprobs']:.1e}, gradient norms within {norms['norm']:.1e}"
    )


def own_processes(field: Field) -> str:
    """Save by one `vlmr1 train`, resume by another one on another layout."""
    logprobs = norm = 0.0
    for saved, others in _PAIRS.items():
        succeed(field.config(f"cross_{saved.name}", train=_TRAIN, parallel=saved.settings), saved.ranks)
        expected = _resumed(field, saved, saved)
        for other in others:
            samples, sampled, grad_norm = _resumed(field, saved, other)
            need(samples == expected[0], f"{saved.name} -> {other.name}: other samples, or other completions of them")
            logprobs = max(logprobs, *(abs(a - b) for a, b in zip(sampled, expected[1], strict=True)))
            norm = max(norm, abs(grad_norm / expected[2] - 1))
    need(logprobs <= LOGPROB_LIMIT, f"next log-probs differ by {logprobs:.1e}")
    need(norm <= NORM_LIMIT, f"gradient norms differ by {norm:.1e}")
    return f"6 pairs: same samples, next log-probs within {logprobs:.1e}, gradient norms within {norm:.1e}"


def _resumed(field: Field, saved: Layout, other: Layout) -> tuple[list[Any], list[float], float]:
    """Resume on `other` for a step; return its samples with their completions, log-probs, and its gradient norm."""
    name = f"cross_{saved.name}_{other.name}"
    run_dir = field.root / name
    source = field.root / f"cross_{saved.name}"
    shutil.copytree(source / "checkpoints", run_dir / "checkpoints", symlinks=True)
    succeed(field.config(name, train=_LONGER, parallel=other.settings, debug={"save_rollouts": True}), other.ranks)
    groups = sorted(read_rollout(run_dir / "rollouts", SAVED_STEP).items())
    samples = [(position, [c.token_ids.tolist() for c in group.completions]) for position, group in groups]
    logprobs = [value for _, group in groups for c in group.completions for value in c.logprobs.tolist()]
    (norm,) = (row["train/grad_norm"] for step, row in read_metrics(run_dir) if step == SAVED_STEP)
    return samples, logprobs, norm
