"""Checksums see every bit and every order; the ranks that differ are told from the others."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from megatron_vlmr1.parallel import replicas
from megatron_vlmr1.parallel.replicas import Replicas, checksums
from tests.distributed import ranks

WORDS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.uint8: torch.uint8, torch.float64: torch.int64}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(replicas, "_CPU_CHUNK", 16)


def whole_number_sum(tensor: torch.Tensor) -> int:
    """The checksum in Python's own integers, as a signed 64-bit number."""
    words = tensor.contiguous().view(-1).view(WORDS[tensor.dtype]).tolist()
    total = sum(word * (2 * i + 1) for i, word in enumerate(words)) % 2**64
    return total - 2**64 if total >= 2**63 else total


@pytest.mark.parametrize("dtype", WORDS, ids=str)
@pytest.mark.parametrize("count", [0, 1, 15, 16, 53])
def test_the_sum_is_exact(dtype, count):
    generator = torch.Generator().manual_seed(count)
    tensor = (torch.randn(count, generator=generator) * 100).to(dtype)
    assert checksums([tensor, torch.zeros(3)]).tolist() == [whole_number_sum(tensor), 0]


@pytest.mark.parametrize("dtype", WORDS, ids=str)
def test_every_bit_counts(dtype):
    tensor = (torch.randn(40, generator=torch.Generator().manual_seed(0)) * 100).to(dtype)
    words = tensor.view(WORDS[dtype])
    before, seen = int(checksums([tensor])[0]), set()
    for place, bit in itertools.product(range(40), range(8 * tensor.element_size())):
        mask = torch.ones(1, dtype=torch.int64).bitwise_left_shift(bit).to(WORDS[dtype])[0]
        words[place] ^= mask
        seen.add(int(checksums([tensor])[0]) - before)
        words[place] ^= mask
    assert 0 not in seen and int(checksums([tensor])[0]) == before


def test_order_and_signs_count():
    tensor = torch.arange(1.0, 41.0)
    variants = [tensor, tensor.flip(0), -tensor, tensor.roll(1), tensor.roll(16)]
    swapped = tensor.clone()
    swapped[[1, 20]] = tensor[[20, 1]]
    sums = checksums([*variants, swapped, tensor.view(5, 8).t()])  # the last is read in the order of its rows
    assert len(set(sums.tolist())) == len(sums)
    assert checksums([]).shape == (0,)


def test_who_differs():
    rows = [[tp, 0, dp, 7, 5] for dp in range(3) for tp in range(2)]
    assert list(replicas._unlike(rows, (0, 1), 3, [0])) == []
    rows[3][3] = 8  # tp 1, dp 1
    [found] = replicas._unlike(rows, (0, 1), 3, [0])
    assert (found.ranks, found.suspects) == ((1, 3, 5), {3})
    rows[5][3] = 9
    [found] = replicas._unlike(rows, (0, 1), 3, [0])
    assert found.suspects == {1, 3, 5}  # no majority
    rows[2][4] = 6
    [found] = replicas._unlike(rows, (1, 2), 4, [0])
    assert (found.ranks, found.suspects) == ((2, 3), {2, 3})


@pytest.mark.parametrize(("every", "expected"), [(0, 0), (1, 3 + 5 * 4), (3, 2 + 1 + 3 + 1)])
def test_it_is_thinned_out(monkeypatch, every, expected):
    calls = []
    monkeypatch.setattr(replicas, "checksums", lambda tensors: calls.append(1) or checksums(tensors))
    with ranks.alone() as mesh:
        checked = Replicas([torch.nn.Linear(3, 3)], SimpleNamespace(chained_optimizers=[]), mesh, every)
        for _ in range(6):
            checked.check(state=True)
            checked.check()
            checked.remember()
        assert len(calls) == expected
        checked.check(always=True)
        assert len(calls) == expected + (every > 0)
