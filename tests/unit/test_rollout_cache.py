"""The cache and who is in it, against attention written out: queues, waves, prompts of all lengths, the ring's end."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_vlmr1.rollout.cache_size import CacheSize, fit
from megatron_vlmr1.rollout.kv_cache import Decode, KvCache
from megatron_vlmr1.rollout.lane import Lane, Request
from megatron_vlmr1.rollout.sampling import Sampling

LAYERS, D = 2, 4


def prompt(i: int, tokens: int) -> SimpleNamespace:
    return SimpleNamespace(position=i, token_ids=np.arange(tokens), next_position=tokens)


def one_rollout(seed: int, alike: bool) -> tuple[float, set[tuple[bool, bool]]]:
    """Decode random keys with random limits in a cache of random size.

    Returns:
        The largest difference from plain attention over the prompt's keys and the completion's own, and which masks
        there were: (prompts', rows').
    """
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    count, generations, longest, heads, per = (int(rng.integers(1, top)) for top in (6, 5, 9, 3, 3))
    lengths = [5] * count if alike else rng.integers(1, 9, count).tolist()
    prompts = [prompt(i, n) for i, n in enumerate(lengths)]
    need = max(lengths) + longest
    size = fit(max(lengths), count, generations, longest, int(rng.integers(need, count * generations * need + 1)))
    assert size is not None
    limits = rng.integers(1, longest + 1, (count, generations)) if rng.random() < 0.7 else None
    most = np.full((count, generations), longest) if limits is None else limits
    requests = [Request(i, j, int(most[i, j])) for i in range(count) for j in range(generations)]
    made: list[tuple[int, int, int]] = []
    sampling = Sampling(longest, frozenset())
    lane = Lane(
        prompts,  # type: ignore[arg-type]
        requests,
        size,
        sampling,
        int(rng.integers(1, 20)),
        lambda i, j, completion: made.append((i, j, len(completion.token_ids))),
        lambda ids: "",
    )
    cache = KvCache(size, LAYERS, heads, D, torch.float32)
    keys: dict[tuple[int, int], torch.Tensor] = {}  # of prompts, [T, heads, 2, D]
    own: dict[tuple[int, int, int], list[torch.Tensor]] = {}
    worst, masks = 0.0, set()
    while lane.busy:
        lane.admit()
        if n := lane.decoding:
            decode = Decode(cache, lane.occupancy(cache), lane.tick)
            masks.add((lane.occupancy(cache).mask is not None, decode._mask is not None))
            for layer in range(LAYERS):
                qkv = torch.randn(n, heads, per + 2, D)
                found = decode.attend(layer, qkv)
                for i in range(n):
                    which = int(lane._rows.prompt[i]), int(lane._rows.number[i]), layer
                    own.setdefault(which, []).append(qkv[i, :, -2:])
                    seen = torch.cat((keys[which[0], layer], torch.stack(own[which])))
                    weights = torch.softmax(torch.einsum("hpd,thd->hpt", qkv[i, :, :-2], seen[:, :, 0]), -1)
                    expected = torch.einsum("hpt,thd->hpd", weights, seen[:, :, 1]).reshape(-1, D)
                    worst = max(worst, float((expected - found[i]).abs().max()))
        for slot, i in zip(lane.entering_slots(), lane.entering, strict=True):
            for layer in range(LAYERS):
                keys[i, layer] = torch.randn(lengths[i], heads, 2, D)
                cache.prompt[layer][int(slot), :, :, : lengths[i]] = keys[i, layer].permute(1, 2, 0, 3)
        lane.take(rng.integers(0, 99, lane.n), np.zeros((2, lane.n), np.float32), cache)
    assert sorted(made) == [(r.prompt, r.number, r.limit) for r in requests]
    return worst, masks


def test_everyone_sees_their_prompt_and_themselves():
    found = [one_rollout(seed, alike=seed % 2 == 0) for seed in range(160)]
    assert max(worst for worst, _ in found) <= 1e-5
    assert set.union(*(masks for _, masks in found)) == {(a, b) for a in (False, True) for b in (False, True)}


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (10**9, CacheSize(4, 1000, 32, 128)),  # everything
        (1000 * 4 + 128 * 20, CacheSize(4, 1000, 20, 128)),  # rows are traded for prompts
        (2127, CacheSize(1, 1000, 8, 128)),  # one whole group
        (1000 + 128 * 3, CacheSize(1, 1000, 3, 128)),
        (1128, CacheSize(1, 1000, 1, 128)),
        (1127, None),
    ],
)
def test_fit(budget, expected):
    assert fit(1000, 4, 8, 128, budget) == expected


def test_more_prompts_than_fill_the_rows_feed_them_where_a_few_completions_are_long():
    """One completion of eight is long: with as many prompts as fill the rows, most rows would wait for it."""
    limits = np.where(np.random.default_rng(0).permuted(np.tile(np.arange(8), (32, 1)), axis=1) == 0, 200, 10)

    def ticks(size: CacheSize) -> int:
        requests = [Request(i, j, int(limits[i, j])) for i in range(32) for j in range(8)]
        prompts = [prompt(i, 5) for i in range(32)]
        sampling = Sampling(200, frozenset())
        lane = Lane(prompts, requests, size, sampling, 1 << 20, lambda *_: None, lambda _: "")  # type: ignore[arg-type]
        cache = KvCache(size, 1, 1, 2, torch.float32)
        while lane.busy:
            lane.admit()
            lane.take(np.zeros(lane.n, np.int64), np.zeros((2, lane.n), np.float32), cache)
        return lane.tick

    tight, roomy = (fit(5, 32, 8, 200, 16 * 200 + slots * 5) for slots in (5, 16))
    assert (tight, roomy) == (CacheSize(5, 5, 16, 200), CacheSize(16, 5, 16, 200))
    assert ticks(tight) < 0.7 * ticks(CacheSize(3, 5, 16, 200))
    assert ticks(roomy) < 1.5 * limits.sum() / 16
