"""Choosing tokens: distributions, random numbers that belong to a token, banned tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megatron_vlmr1.models.logprobs import Vocabulary
from megatron_vlmr1.rollout.sampling import Sampling, _Masses, choose, draw, streams

CRITICAL = 29.88  # of chi-square with 7 degrees of freedom at 1e-4


def chosen(mesh, logits: torch.Tensor, sampling: Sampling, random: torch.Tensor | None, banned=()):
    vocabulary = Vocabulary(logits.shape[1], logits.shape[1], banned, mesh.tp_group, torch.device("cpu"))
    masked = logits.clone()
    masked[:, list(banned)] = -math.inf
    return choose(masked, vocabulary, sampling, random)[:2]


def uniforms(seed: int, prompts: np.ndarray, completions: np.ndarray, position: int) -> np.ndarray:
    return draw(streams(seed, prompts, completions), np.full_like(prompts, position))


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_the_distribution(mesh, temperature, record_property):
    n, row = 40_000, torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5, -0.5, 1.5, 0.2, 3.0])
    ids = np.arange(n)
    random = torch.from_numpy(uniforms(7, ids // 8, ids % 8, 3))
    tokens, logprobs = chosen(mesh, row.repeat(n, 1), Sampling(1, frozenset(), temperature), random, banned=[8])
    p = torch.softmax(row[:8] / temperature, 0).double()
    counts = torch.bincount(tokens, minlength=9).double()
    assert counts[8] == 0
    chi_square = float(((counts[:8] - n * p) ** 2 / (n * p)).sum())
    record_property("chi-square", chi_square)
    assert chi_square < CRITICAL
    expected = torch.log_softmax(row[:8], 0)[tokens]  # at T=1, whatever the temperature
    assert (logprobs - expected).abs().max() <= 1e-6


def test_greedy(mesh):
    logits = torch.randn(50, 33, generator=torch.Generator().manual_seed(0))
    tokens, logprobs = chosen(mesh, logits, Sampling(1, frozenset(), greedy=True), None, banned=[4, 32])
    masked = logits.clone()
    masked[:, [4, 32]] = -math.inf
    assert tokens.tolist() == masked.argmax(1).tolist()
    assert (logprobs - torch.log_softmax(masked, 1).max(1).values).abs().max() <= 1e-6


@pytest.mark.parametrize("u", [0.0, 2.0**-53, 0.5, 1 - 2.0**-53])
def test_the_ends_of_the_interval_pick_tokens_that_can_be(mesh, u):
    logits = torch.randn(500, 64, generator=torch.Generator().manual_seed(1)) * 20
    banned = [0, 1, 30, 62, 63]
    random = torch.full((500,), u, dtype=torch.float64)
    tokens, logprobs = chosen(mesh, logits, Sampling(1, frozenset()), random, banned)
    assert not torch.isin(tokens, torch.tensor(banned)).any() and logprobs.isfinite().all()


@pytest.mark.parametrize("v", [64, 2048, 2049, 2304, 3000, 5000])
def test_large_vocabularies_are_inverted_exactly_and_a_rank_without_tokens_points_at_one_of_its_own(v):
    p = torch.rand(200, v, generator=torch.Generator().manual_seed(v))
    p[:, [0, 1, v // 2, v - 2, v - 1]] = 0
    masses = _Masses(p)
    u = torch.rand(200, generator=torch.Generator().manual_seed(1)).double()
    u[:3] = torch.tensor([0.0, 2.0**-53, 1 - 2.0**-53]).double()
    tokens = masses.invert(u * masses.reach)
    assert (p.gather(1, tokens[:, None]) > 0).all()
    running = p.double().cumsum(-1)
    above, below = running.gather(1, tokens[:, None])[:, 0], running.gather(1, (tokens - 1)[:, None])[:, 0]
    target = u * running[:, -1]
    assert (above >= target * (1 - 1e-6)).all() and (below <= target * (1 + 1e-6)).all()
    nothing = _Masses(torch.zeros(2, v))
    assert nothing.invert(nothing.reach).max() < v


def test_one_token_has_all_the_probability(mesh):
    logits = torch.full((3, 6), -math.inf)
    logits[:, 4] = 1.0
    tokens, logprobs = chosen(mesh, logits, Sampling(1, frozenset()), torch.tensor([0.0, 0.5, 1 - 2.0**-53]).double())
    assert tokens.tolist() == [4, 4, 4] and logprobs.tolist() == [0, 0, 0]


def test_uniforms_belong_to_the_token():
    prompts, completions = np.meshgrid(np.arange(300), np.arange(8), indexing="ij")
    table = np.stack([uniforms(3, prompts.ravel(), completions.ravel(), t) for t in range(16)])
    assert ((table >= 0) & (table < 1)).all() and len(np.unique(table)) == table.size
    some = np.array([17, 4, 250])
    alone = uniforms(3, some, np.array([2, 7, 0]), 5)
    assert alone.tolist() == [table[5, 17 * 8 + 2], table[5, 4 * 8 + 7], table[5, 250 * 8]]
    assert not np.isin(uniforms(4, some, np.array([2, 7, 0]), 5), table).any()


def test_uniforms_are_uniform_and_independent(record_property):
    n = 200_000
    ids = np.arange(n)
    streams = {
        "prompts": uniforms(0, ids, np.zeros_like(ids), 0),
        "completions": uniforms(0, np.zeros_like(ids), ids, 0),
        "positions": np.concatenate([uniforms(0, ids[:20], ids[:20], t) for t in range(n // 20)]),
    }
    for name, values in streams.items():
        counts = np.histogram(values, bins=8, range=(0, 1))[0]
        chi_square = float(((counts - n / 8) ** 2 / (n / 8)).sum())
        record_property(name, chi_square)
        assert chi_square < CRITICAL, name
        for lag in (1, 8, 20):
            correlation = np.corrcoef(values[:-lag], values[lag:])[0, 1]
            assert abs(correlation) < 5 / math.sqrt(n), (name, lag)
