"""Log-probs, their backward and entropies in one process, against log_softmax and autograd."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from megatron_vlmr1.models import logprobs
from megatron_vlmr1.models.logprobs import Vocabulary, token_logprobs

CASES = json.loads((Path(__file__).parent / "data" / "grpo_cases.json").read_text())["cases"]
BANNED = [0, 5, 499]


def vocabulary(mesh, rows: int, size: int, banned: list[int]) -> Vocabulary:
    return Vocabulary(rows, size, banned, mesh.tp_group, torch.device("cpu"))


@pytest.mark.parametrize("tile", [(1024, 512), (33, 70), (5, 60), (20, 1), (1, 502)])
def test_against_autograd(mesh, monkeypatch, tile):
    monkeypatch.setitem(logprobs.TILES, "cpu", tile)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(33, 16, generator=generator), torch.randn(502, 16, generator=generator)
    labels = torch.randint(6, 499, (33,), generator=generator)
    upstream = torch.randn(33, generator=generator)
    leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
    found, entropy = token_logprobs(*leaves, labels, vocabulary(mesh, 502, 501, BANNED))
    (found * upstream).sum().backward()

    plain = [t.double().requires_grad_() for t in (hidden, weight)]
    logits = plain[0] @ plain[1].t()
    logits[:, [*BANNED, 501]] = -math.inf
    table = torch.log_softmax(logits, dim=-1)
    expected = table.gather(1, labels[:, None])[:, 0]
    (expected * upstream.double()).sum().backward()
    assert (found - expected).abs().max() <= 1e-5
    assert (entropy + (table.exp() * table.masked_fill(table.isinf(), 0)).sum(-1)).abs().max() <= 1e-5
    for ours, theirs in zip(leaves, plain, strict=True):
        assert (ours.grad - theirs.grad).norm() <= 1e-6 * theirs.grad.norm()
    assert leaves[1].grad[[*BANNED, 501]].eq(0).all()
    assert not entropy.requires_grad


def test_bf16_weights_get_bf16_gradients_from_fp32_sums(mesh):
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, 16, generator=generator).bfloat16().requires_grad_() for n in (40, 64))
    labels = torch.randint(0, 64, (40,), generator=generator)
    found, _ = token_logprobs(hidden, weight, labels, vocabulary(mesh, 64, 64, []))
    found.sum().backward()
    assert (found.dtype, hidden.grad.dtype, weight.grad.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    plain = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    torch.log_softmax(plain[0] @ plain[1].t(), -1).gather(1, labels[:, None]).sum().backward()
    for ours, theirs in zip((hidden, weight), plain, strict=True):
        assert (ours.grad - theirs.grad).norm() <= 1e-2 * theirs.grad.norm()


def test_no_label_at_all(mesh):
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.ones(8, 4, requires_grad=True)
    found, entropy = token_logprobs(hidden, weight, torch.zeros(0, dtype=torch.int64), vocabulary(mesh, 8, 8, []))
    found.sum().backward()
    assert found.shape == entropy.shape == (0,) and weight.grad.eq(0).all() and hidden.grad.shape == (0, 4)


def test_large_logits_stay_finite(mesh):
    hidden, weight = torch.full((1, 1), 1e4), torch.tensor([[1.0], [0.5], [-1.0]])
    found, entropy = token_logprobs(hidden, weight, torch.tensor([0]), vocabulary(mesh, 3, 3, []))
    assert (found.item(), entropy.item()) == (0.0, 0.0)


@pytest.mark.parametrize("case", [c for c in CASES if c["function"] == "per_token_logps"])
def test_published_log_probs(mesh, case):
    logits, ids = torch.tensor(case["inputs"]["logits"]), torch.tensor(case["inputs"]["input_ids"])
    width = logits.shape[-1]
    rows = logits[:, :-1].reshape(-1, width)  # the last position predicts nothing
    found, _ = token_logprobs(rows, torch.eye(width), ids[:, 1:].reshape(-1), vocabulary(mesh, width, width, []))
    assert (found - torch.tensor(case["expected"]).reshape(-1)).abs().max() <= 1e-6
