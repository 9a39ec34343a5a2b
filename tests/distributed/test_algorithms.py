"""Each algorithm against its equation on transformers' model: losses and gradients of every parameter; twenty steps."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vlmr1.grpo.algorithms import ALGORITHMS
from tests.checkpoints import banned_ids, plain_model, write_random_checkpoint
from tests.distributed import plain, ranks
from tests.distributed.plain import within


@dataclass
class Reference:
    """transformers' log-probs of the saved rollout under the weights before each iteration."""

    root: Path

    @cached_property
    def groups(self) -> Any:
        from tests.distributed import work_algorithms

        return work_algorithms.scored_groups(self.root)

    @cached_property
    def models(self) -> list[Any]:
        return [plain_model(self.root / f"weights_{i}") for i in range(4)]

    @cached_property
    def tables(self) -> list[plain.Table]:
        return [plain.table(model, self.groups, banned_ids(self.root / "policy")) for model in self.models]

    @cached_property
    def old(self) -> plain.Table:
        return {key: row.detach() for key, row in self.tables[0].items()}

    @cached_property
    def fixed(self) -> plain.Table:
        with torch.no_grad():
            return plain.table(plain_model(self.root / "reference"), self.groups, banned_ids(self.root / "policy"))

    def loss(self, run: plain.Settings, iteration: int) -> torch.Tensor:
        return plain.algorithm_loss(run, self.groups, self.tables[iteration], self.old, self.fixed)

    def gradients(self, run: plain.Settings, iteration: int) -> plain.Tensors:
        return plain.gradients(self.models[iteration], self.loss(run, iteration), keep=True)


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Reference:
    root = tmp_path_factory.mktemp("algorithms")
    for seed, name in enumerate(("policy", "reference")):
        write_random_checkpoint(root / name, seed=seed)
    with ranks.alone() as mesh:
        from tests.distributed import work_algorithms

        with torch.random.fork_rng():
            work_algorithms.alone(root, mesh)
    ranks.run(2, work_algorithms.pair, root)
    return Reference(root)


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_losses_and_gradients(reference, algorithm, beta, record_property):
    from tests.distributed import work_algorithms as work

    found = json.loads((reference.root / "one" / "found.json").read_text())
    runs = [(run, n) for run, n in work.cases() if (run.algorithm, run.beta, run.cap) == (algorithm, beta, None)]
    assert [n for _, n in runs] == [1, 2, 4]
    first, second = (reference.gradients(runs[0][0], i) for i in (0, 1))
    assert all(g.norm() > 0 for g in first.values()) and any(name.startswith("visual.") for name in first)
    for run, iterations in runs:
        name = work.label(run, iterations)
        assert len(found[name]["losses"]) == iterations
        for i, loss in enumerate(found[name]["losses"]):
            within(record_property, f"{name} loss {i}", abs(loss - float(reference.loss(run, i))), 1e-5)
        for i, expected in enumerate((first, second)[:iterations]):
            difference, where = plain.worst(plain.read(reference.root / "one" / name / str(i)), expected)
            within(record_property, f"{name} gradients {i}", difference, 1e-5, where)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("spread", ["one", "uneven", "empty"])
def test_truncated_importance_wherever_the_groups_are(reference, algorithm, spread, record_property):
    """Rollout log-probs are off by 20%. The groups lie on one rank; one and two on two ranks; three and none."""
    from tests.distributed import work_algorithms as work

    ((run, iterations),) = ((run, n) for run, n in work.cases() if run.algorithm == algorithm and run.cap is not None)
    name = work.label(run, iterations)
    found = json.loads((reference.root / spread / "found.json").read_text())[name]
    gaps = [
        old - torch.from_numpy(reference.groups[g].completions[i].logprobs) for (g, i), old in reference.old.items()
    ]
    capped = float((torch.cat(gaps).exp() > run.cap).float().mean())
    assert found["metrics"]["grpo/tis_capped_frac"] == pytest.approx(capped) and 0.1 < capped < 0.6
    for i in range(iterations):
        loss, expected = float(reference.loss(run, i)), reference.gradients(run, i)
        within(record_property, f"{name} {spread} loss {i}", abs(found["losses"][i] - loss), 1e-5)
        difference, where = plain.worst(plain.read(reference.root / spread / name / str(i)), expected)
        within(record_property, f"{name} {spread} gradients {i}", difference, 1e-5, where)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_second_iteration_clips_and_counts_it(reference, algorithm):
    from tests.distributed import work_algorithms as work

    ((run, _),) = ((run, n) for run, n in work.cases() if run.algorithm == algorithm and run.cap is not None)
    metrics = json.loads((reference.root / "one" / "found.json").read_text())[work.label(run, 2)]["metrics"]
    clipped, tops = 0, []
    for (g, i), new in reference.tables[1].items():
        log_ratio = (new - reference.old[g, i]).detach()
        ratio = (log_ratio.mean() if algorithm == "gspo" else log_ratio).exp().expand(len(new))
        a = plain.advantage(algorithm, reference.groups[g], i)
        over, under = ratio > 1 + run.high, ratio < 1 - run.low
        clipped += int((over | under if algorithm == "cispo" else over if a > 0 else under).sum())
        tops.append(float(ratio.max()))
    tokens = sum(map(len, reference.old.values()))
    assert metrics["grpo/clip_frac"] == pytest.approx(clipped / tokens) and 0 < clipped < tokens
    assert metrics["grpo/ratio_max"] == pytest.approx(max(tops), rel=1e-4) and max(tops) > 1.01


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_twenty_steps_on_two_ranks(reference, algorithm):
    rows = json.loads((reference.root / "courses.json").read_text())[algorithm]
    assert len(rows) == 20
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert all(row["train/grad_norm"] > 0 and row["train/skipped"] == 0 for row in rows)
    assert all(row["grpo/ratio_max"] > 1 for row in rows)
    assert rows[-1]["grpo/kl"] != rows[0]["grpo/kl"]
    first, last = (sum(row["reward"] for row in part) / 5 for part in (rows[:5], rows[-5:]))
    assert last > first + 0.02, (first, last)
