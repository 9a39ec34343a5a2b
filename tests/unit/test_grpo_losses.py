"""The loss against the published code's numbers: value, gradient, KL; and an honest share of clipped tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_vlmr1.config import parse
from megatron_vlmr1.data.packing import MicroBatch, pack
from megatron_vlmr1.grpo.losses import clipped_surrogate, k3
from megatron_vlmr1.grpo.update import GrpoUpdate
from megatron_vlmr1.types import Completion, Group, Prompt
from tests.distributed import ranks

CASES = json.loads((Path(__file__).parent / "data" / "grpo_cases.json").read_text())["cases"]
CLIPPED = [0.0, 0.0, 2 / 5]  # by hand; the published figure counts the tokens that the minimum does not clip


class Tables:
    """Stands where the updater and the reference do: log-probs are given numbers [n, L] instead of a model's."""

    def __init__(self, grpo: dict[str, Any], new: torch.Tensor, old: torch.Tensor | None, reference: torch.Tensor):
        raw = {"model": {"path": "-"}, "data": {"train": "-"}, "grpo": grpo}
        self.cfg = parse(raw, "test")
        self.new, self.old, self.reference = new, old, reference
        self.gradients: list[torch.Tensor] = []
        self.metrics: list[dict[str, float]] = []
        self._swapped = False

    @property
    def policy(self) -> Any:
        mesh = SimpleNamespace(dp_group=None, is_last_stage=True, tp_rank=0)
        return SimpleNamespace(mesh=mesh, logprobs=lambda hidden, rows, ids: (hidden, torch.ones(len(hidden))))

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        self._swapped = True
        yield
        self._swapped = False

    def micro_batches(self, groups: list) -> list[MicroBatch]:
        return [pack([group], 500, 1) for group in groups]

    def logprobs(self, batches: list[MicroBatch], size: tuple[int, int]) -> torch.Tensor:
        table = self.reference if self._swapped else self.old
        assert table is not None
        return table[: size[0], : size[1]]

    def step(self, batches: list[MicroBatch], loss: Any, lr: float) -> tuple[list, dict[str, float]]:
        leaf = self.new.clone().requires_grad_()
        results = []
        for batch in batches:
            value, result = loss(leaf[batch.label_slots, batch.label_index], batch)
            value.backward()
            results.append(result)
        assert leaf.grad is not None
        self.gradients.append(leaf.grad)
        return results, {}


def groups(lengths: list[int], advantages: list[float]) -> list[Group]:
    """One group for each completion."""
    ids = np.zeros(2, np.int64)
    prompt = Prompt(0, "k", ids, np.zeros((3, 2), np.int64), (), "", "")
    return [
        Group(
            prompt,
            (Completion(np.ones(n, np.int64), np.zeros(n, np.float32), "stop", ""),),
            (),
            np.array([a], np.float32),
        )
        for n, a in zip(lengths, advantages, strict=True)
    ]


@pytest.mark.parametrize(
    ("case", "clipped"), zip([c for c in CASES if c["function"] == "grpo_loss"], CLIPPED, strict=True)
)
def test_published(case, clipped):
    given = case["inputs"]
    tables = [None if given[k] is None else torch.tensor(given[k]) for k in KEYS]
    stand_in = Tables({k: given[k] for k in ("beta", "epsilon_low", "epsilon_high", "num_iterations")}, *tables)
    lengths = [sum(row) for row in given["completion_mask"]]
    with ranks.alone():
        metrics = GrpoUpdate(stand_in, stand_in)(groups(lengths, given["advantages"]), 0.0)  # type: ignore[arg-type]
    assert len(stand_in.gradients) == given["num_iterations"]
    for gradient in stand_in.gradients:
        assert (gradient - torch.tensor(case["grad"])).abs().max() <= 1e-6
    assert metrics["train/loss"] == pytest.approx(case["expected"], abs=1e-6)
    assert metrics["grpo/kl"] == pytest.approx(case["kl"], abs=1e-6)
    assert metrics["grpo/clip_frac"] == pytest.approx(clipped)
    assert metrics["train/tokens"] == sum(lengths)
    ratio = 1.0 if tables[1] is None else float(torch.exp(tables[0] - tables[1])[torch.tensor(MASK).bool()].max())
    assert metrics["grpo/ratio_max"] == pytest.approx(ratio)
    assert metrics["grpo/entropy"] == pytest.approx(1.0)


KEYS = ("per_token_logps", "old_per_token_logps", "ref_per_token_logps")
MASK = [[1, 1, 1, 0], [1, 1, 0, 0]]


def test_a_clipped_token_is_one_without_a_gradient():
    generator = torch.Generator().manual_seed(0)
    new = (torch.randn(4000, generator=generator) * 0.4).requires_grad_()
    old, advantages = torch.zeros(4000), torch.randn(4000, generator=generator)
    loss, ratio, clipped = clipped_surrogate(new, old, advantages, 0.2, 0.28)
    loss.sum().backward()
    assert torch.equal(new.grad == 0, clipped) and 0.1 < clipped.float().mean() < 0.6
    expected = -torch.minimum(ratio * advantages, ratio.clip(0.8, 1.28) * advantages)
    assert torch.equal(loss, expected)
    free = ~clipped
    assert torch.allclose(new.grad[free], -(ratio * advantages)[free])


def test_k3_is_an_estimate_of_the_divergence():
    generator = torch.Generator().manual_seed(1)
    p, q = (torch.log_softmax(torch.randn(10, generator=generator), 0) for _ in range(2))
    values = k3(p, q)
    assert (values >= 0).all() and k3(p, p).eq(0).all()
    divergence = (p.exp() * (p - q)).sum()  # the mean of k3 under p is KL(p || q) exactly
    assert float((p.exp() * values).sum()) == pytest.approx(float(divergence), rel=1e-5)


def test_a_completion_without_an_advantage_takes_no_part():
    reference = torch.zeros(3, 4)
    new = -torch.rand(3, 4, generator=torch.Generator().manual_seed(2))
    with ranks.alone():
        stand_in = Tables({}, new[[0, 2]], None, reference)
        metrics = GrpoUpdate(stand_in, stand_in)(groups([3, 4, 2], [1.0, float("nan"), -0.5]), 0.0)  # type: ignore[arg-type]
    assert metrics["train/tokens"] == 5  # a row of the table for each completion that is kept
    expected = torch.zeros(2, 4)
    expected[0, :3], expected[1, :2] = -1.0 / (3 * 2), 0.5 / (2 * 2)
    kl = torch.zeros(2, 4)
    kl[0, :3], kl[1, :2] = (0.04 * (1 - torch.exp(-new[0, :3])) / 6), (0.04 * (1 - torch.exp(-new[2, :2])) / 4)
    assert (stand_in.gradients[0] - expected - kl).abs().max() <= 1e-6
