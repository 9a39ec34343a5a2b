"""The loss against the published code's numbers: value, gradient, KL; and an honest share of clipped tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_vlmr1.grpo.losses import Tokens, clipped_importance, clipped_surrogate, k3, sequence_surrogate
from megatron_vlmr1.grpo.update import GrpoUpdate
from tests.distributed import ranks
from tests.given_logprobs import Tables, groups

CASES = json.loads((Path(__file__).parent / "data" / "grpo_cases.json").read_text())["cases"]
CLIPPED = [0.0, 0.0, 2 / 5]  # by hand; the published figure counts the tokens that the minimum does not clip


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


def many_tokens() -> Tokens:
    """4000 tokens of 500 completions; ratios far from one, a third of the advantages zero."""
    generator = torch.Generator().manual_seed(0)
    logprobs = torch.randn(4000, generator=generator) * 0.4
    completions = torch.arange(4000) % 500
    advantages = torch.randn(500, generator=generator)
    advantages[::3] = 0.0
    lengths = torch.full((500,), 8.0)
    return Tokens(logprobs.requires_grad_(), torch.zeros(4000), advantages[completions], completions, lengths)


def test_a_clipped_token_is_one_without_a_gradient():
    tokens = many_tokens()
    new, advantages = tokens.logprobs, tokens.advantages
    loss, ratio, clipped = clipped_surrogate(tokens, 0.2, 0.28)
    loss.sum().backward()
    assert torch.equal((new.grad == 0) & (advantages != 0), clipped) and 0.1 < clipped.float().mean() < 0.6
    expected = -torch.minimum(ratio * advantages, ratio.clip(0.8, 1.28) * advantages)
    assert torch.equal(loss, expected)
    free = ~clipped
    assert torch.allclose(new.grad[free], -(ratio * advantages)[free])


def test_a_clipped_completion_is_one_without_a_gradient():
    tokens = many_tokens()
    loss, ratio, clipped = sequence_surrogate(tokens, 0.1, 0.15)
    loss.sum().backward()
    gradient, advantages = tokens.logprobs.grad, tokens.advantages
    assert torch.equal((gradient == 0) & (advantages != 0), clipped) and 0.05 < clipped.float().mean() < 0.6
    mean = tokens.logprobs.detach().view(8, 500).mean(0).repeat(8)
    assert torch.allclose(ratio, mean.exp())
    # each of a completion's 8 tokens carries the loss, and moves the ratio by an eighth
    assert torch.allclose(gradient[~clipped], -(ratio * advantages)[~clipped])


def test_a_clipped_weight_keeps_its_gradient():
    tokens = many_tokens()
    loss, ratio, clipped = clipped_importance(tokens, 0.2, 0.28)
    loss.sum().backward()
    outside = (ratio < 0.8) | (ratio > 1.28)
    assert torch.equal(clipped, outside & (tokens.advantages != 0)) and 0.3 < clipped.float().mean() < 0.9
    assert torch.allclose(tokens.logprobs.grad, -ratio.clip(0.8, 1.28) * tokens.advantages)
    assert not clipped_importance(tokens, 1.0, 1e9).clipped.any()  # the ratio is never below zero


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
