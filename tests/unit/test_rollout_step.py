"""The tick of fixed shape that bursts repeat: who sees which keys, and which shapes there are."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

from megatron_vlmr1.rollout.cache_size import CacheSize, fit
from megatron_vlmr1.rollout.kv_cache import Grid, KvCache, grid_numbers
from megatron_vlmr1.rollout.lane import Lane, Request
from megatron_vlmr1.rollout.sampling import Sampling
from megatron_vlmr1.rollout.step import Bucket, _Attention

LAYERS, D = 2, 4


def prompt(i: int, tokens: int) -> SimpleNamespace:
    return SimpleNamespace(position=i, token_ids=np.arange(tokens), next_position=tokens)


def one_rollout(seed: int) -> tuple[float, set[str]]:
    """Decode random keys in bursts, with random limits and stops, in a cache of random size.

    Returns:
        The largest difference from plain attention over the prompt's keys and the completion's own, and what happened.
    """
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    count, generations, longest, heads, per, most = (int(rng.integers(1, top)) for top in (6, 5, 9, 3, 3, 7))
    lengths = rng.integers(1, 9, count).tolist()
    need = max(lengths) + longest
    size = fit(max(lengths), count, generations, longest, int(rng.integers(need, count * generations * need + 1)))
    assert size is not None
    limits = rng.integers(1, longest + 1, (count, generations))
    requests = [Request(i, j, int(limits[i, j])) for i in range(count) for j in range(generations)]
    made: dict[tuple[int, int], list[int]] = {}
    drawn: dict[tuple[int, int], list[int]] = {(r.prompt, r.number): [] for r in requests}
    lane = Lane(
        [prompt(i, n) for i, n in enumerate(lengths)],  # type: ignore[misc]
        requests,
        size,
        Sampling(longest, frozenset({0, 1})),
        int(rng.integers(1, 20)),
        lambda i, j, completion: made.update({(i, j): completion.token_ids.tolist()}),
        lambda ids: "",
    )
    cache = KvCache(size, LAYERS, heads, D, torch.float64)
    keys: dict[tuple[int, int], torch.Tensor] = {}  # of prompts, [T, heads, 2, D]
    own: dict[tuple[int, int, int], list[torch.Tensor]] = {}
    worst, seen = 0.0, set()
    while lane.busy:
        lane.let_in()
        for slot, i in zip(lane.entering_slots(), lane.entering, strict=True):
            for layer in range(LAYERS):
                keys[i, layer] = torch.randn(lengths[i], heads, 2, D, dtype=torch.float64)
                cache.prompt[layer][int(slot), :, :, : lengths[i]] = keys[i, layer].permute(1, 2, 0, 3)
        burst, n = lane.begin_burst(most), lane.n
        who = [(int(lane._rows.prompt[i]), int(lane._rows.number[i])) for i in range(n)]
        left = lane._rows.limit[:n] - lane._rows.length[:n] - (np.arange(n) >= burst.entered)
        tokens = rng.integers(0, 12, (burst.ticks + 1, n))
        for tick in range(burst.ticks):
            bucket = Bucket.of(burst, cache)
            at = attention_of(burst, bucket, cache, burst.first + tick)
            seen |= {name for name, x in (("padded", bucket.rows > n), ("round", burst.first + tick >= longest)) if x}
            for layer in range(LAYERS):
                qkv = torch.randn(bucket.rows, heads, per + 2, D, dtype=torch.float64)
                found = at.attend(layer, qkv)
                for i in np.flatnonzero(tick < left):
                    which = *who[i], layer
                    own.setdefault(which, []).append(qkv[i, :, -2:])
                    visible = torch.cat((keys[which[0], layer], torch.stack(own[which])))
                    worst = max(worst, float((plain(qkv[i, :, :-2], visible) - found[i]).abs().max()))
                seen |= {"behind the limit"} if (tick >= left).any() else set()
        lane.take_burst(tokens, np.zeros((burst.ticks + 1, 2, n), np.float32), cache)
        for i, name in enumerate(who):
            drawn[name] += tokens[0 if i >= burst.entered else 1 :, i].tolist()
    assert made == {name: until_end(row, limits[name]) for name, row in drawn.items()}
    return worst, seen


def until_end(row: list[int], limit: int) -> list[int]:
    """A row's tokens up to its first stop, or to its limit."""
    stops = [k for k, token in enumerate(row) if token < 2]
    return row[: min([limit, *(k + 1 for k in stops)])]


def plain(q: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Attention of queries [Hkv, per, D] over keys and values [T, Hkv, 2, D], written out: [H, D]."""
    weights = torch.softmax(torch.einsum("hpd,thd->hpt", q, visible[:, :, 0]), -1)
    return torch.einsum("hpt,thd->hpd", weights, visible[:, :, 1]).reshape(-1, D)


def attention_of(burst, bucket, cache, tick):
    heads = cache.own.shape[2]
    pairs, cells = grid_numbers(burst.slots, bucket.prompts, bucket.width, heads)
    padded = np.zeros(bucket.rows * heads, dtype=np.int64)
    padded[: len(cells)] = cells
    lengths, since = torch.zeros(bucket.prompts, dtype=torch.int64), torch.full((bucket.rows,), burst.first)
    lengths[: len(burst.lengths)] = torch.from_numpy(burst.lengths)
    since[: len(burst.since)] = torch.from_numpy(burst.since)
    grid = Grid(torch.from_numpy(pairs), torch.from_numpy(padded), bucket.prompts * heads)
    return _Attention(bucket, cache).at(torch.tensor([tick]), lengths, since, grid)


def test_everyone_sees_their_prompt_and_themselves():
    found = [one_rollout(seed) for seed in range(60)]
    assert max(worst for worst, _ in found) <= 2e-6  # weights are fp32
    assert set.union(*(seen for _, seen in found)) == {"padded", "round", "behind the limit"}


def test_shapes_are_powers_of_two_or_all_there_is():
    cache = KvCache(CacheSize(6, 300, 24, 256), 1, 1, 2, torch.float32)

    def bucket(slots: list[int], since: int, first: int, longest: int, ticks: int = 4) -> Bucket:
        lengths = np.full(max(slots) + 1, longest)
        return Bucket.of(
            SimpleNamespace(
                slots=np.array(slots), lengths=lengths, since=np.full(len(slots), since), first=first, ticks=ticks
            ),  # type: ignore[arg-type]
            cache,
        )

    assert bucket([0, 0, 1], 1, 60, 65) == Bucket(8, 2, 2, 128, 64)
    assert bucket([0, 0, 1], 1, 61, 64) == Bucket(8, 2, 2, 64, 128)  # the last tick's column is the 65th
    assert bucket([0] * 9 + [4] * 8, 0, 100, 257) == Bucket(24, 6, 16, 300, 128)
    assert bucket([0], 254, 254, 10).own_tokens == 256  # round the end
    assert bucket([0], 1, 256, 10).own_tokens == 256  # a whole round: column 0 belongs to its last tick
