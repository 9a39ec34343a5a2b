"""A tick of decoding on tensors of fixed shapes and addresses: the same kernels whatever the tick.

The drawn tokens are the next tick's inputs, so that ticks follow each other without the host. Whatever differs from
tick to tick, or from burst to burst, is read from the device: masks are computed there, and a key's column is an index.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from megatron_vlmr1.rollout.forward import Forward
from megatron_vlmr1.rollout.kv_cache import Grid, KvCache, Seen, attend, by_layer, grid_numbers
from megatron_vlmr1.rollout.lane import Burst
from megatron_vlmr1.rollout.sampling import Sampling, choose
from megatron_vlmr1.runtime import device

_ROWS = 8  # the fewest rows of a tick, and
_TOKENS = 64  # of keys
_NEVER = float("-inf")


@dataclass(frozen=True)
class Bucket:
    """Shapes that a burst is padded to: powers of two, or all that the cache has."""

    rows: int
    prompts: int
    width: int  # most rows of a prompt
    prompt_tokens: int
    own_tokens: int  # columns that keys of completions are read from, the first ones

    @classmethod
    def of(cls, burst: Burst, cache: KvCache) -> Bucket:
        """Return the shapes of a burst with at least one tick."""
        size = cache.size
        columns = cache.columns(int(burst.since.min()), burst.first + burst.ticks - 1)
        return cls(
            _padded(len(burst.slots), _ROWS, size.rows),
            _padded(len(burst.lengths), 1, size.prompts),
            _padded(int(np.bincount(burst.slots).max()), 1, size.rows),
            _padded(int(burst.lengths.max()), _TOKENS, size.prompt_tokens),
            _padded(columns.stop, _TOKENS, size.row_tokens),
        )


def _padded(n: int, least: int, most: int) -> int:
    return min(max(least, 1 << (n - 1).bit_length()), most)


class Step:
    """The tick of one bucket: call it once for each tick of the burst that was loaded.

    Rows and cells of padding compute with what lies in slots of the cache that nobody uses, and nobody looks at it.
    """

    def __init__(
        self,
        bucket: Bucket,
        forward: Forward,
        cache: KvCache,
        sampling: Sampling,
        most_ticks: int,
        seen: torch.Tensor | None = None,
    ) -> None:
        """`sampling` is read but for its seed, stops and limit; at most `most_ticks` follow one another.

        `seen`, which other buckets may share, has a place for each token that each row of the cache may have had, bool
        [rows, vocabulary / tp]; None where nothing is penalised.
        """
        self._bucket, self._forward, self._cache, self._sampling = bucket, forward, cache, sampling
        heads, rows = cache.own.shape[2], bucket.rows
        sizes = {
            "tokens": rows,
            "positions": rows,
            "since": rows,
            "pairs": bucket.prompts * heads * bucket.width,
            "cells": rows * heads,
            "lengths": bucket.prompts,
            "tick": 1,
            "number": 1,  # of the tick within its burst, from 1
            "uniforms": (most_ticks + 1) * rows,
        }
        where, total = device.device(), sum(sizes.values())
        self._host = device.host_empty(total, torch.int64)
        self._numbers = torch.zeros(total, dtype=torch.int64, device=where)  # one copy brings all of a burst
        self._on_host = _split(self._host, sizes)
        part = _split(self._numbers, sizes)
        self._tokens, self._positions, self._since = part["tokens"], part["positions"], part["since"]
        self._lengths, self._tick, self._number = part["lengths"], part["tick"], part["number"]
        self._uniforms = part["uniforms"].view(torch.float64).view(-1, rows)
        self._grid = Grid(part["pairs"], part["cells"], bucket.prompts * heads)
        self._table = torch.zeros(most_ticks + 1, 3, rows, dtype=torch.float64, device=where)
        self._host_table = device.host_empty(self._table.shape, torch.float64)
        self._first: torch.Tensor | None = None
        self._entered = self._rows = 0
        self._seen = None if seen is None else seen[:rows]
        self._attention = _Attention(bucket, cache)

    def load(self, burst: Burst, first: torch.Tensor | None, seen: torch.Tensor | None) -> None:
        """Get ready for a burst.

        Args:
            burst: of this bucket.
            first: [3, new], first tokens of rows that entered and their log-probs, on the device; None without any.
            seen: bool [n, vocabulary / tp], which tokens each row has; None without a penalty.
        """
        n, bucket, heads = len(burst.slots), self._bucket, self._cache.own.shape[2]
        pairs, cells = grid_numbers(burst.slots, bucket.prompts, bucket.width, heads)
        self._host.zero_()
        for name, values in (
            ("tokens", burst.tokens),
            ("positions", burst.positions),
            ("pairs", pairs),
            ("cells", cells),
            ("lengths", burst.lengths),
        ):
            self._on_host[name].numpy()[: len(values)] = values
        self._on_host["since"].fill_(burst.first)
        self._on_host["since"].numpy()[:n] = burst.since
        self._on_host["tick"].fill_(burst.first)
        self._on_host["number"].fill_(1)
        uniforms = self._on_host["uniforms"].numpy().view(np.float64).reshape(-1, bucket.rows)
        uniforms[: burst.ticks + 1, :n] = burst.uniforms
        self._first, self._entered, self._rows = first, burst.entered, n
        if self._seen is not None:
            assert seen is not None
            self._seen[:n].copy_(seen)
        self.reset()

    def reset(self) -> None:
        """Put everything as it is at the beginning of the burst that was loaded last."""
        self._numbers.copy_(self._host, non_blocking=True)
        if self._first is not None:
            new = slice(self._entered, self._rows)
            self._table[0, :, new].copy_(self._first)
            self._tokens[new].copy_(self._first[0])

    def __call__(self) -> None:
        """Feed each row its token, draw the next one, and keep it for the next tick and for the host."""
        forward, policy, sampling = self._forward, self._forward.policy, self._sampling
        vocabulary = policy.vocabulary
        if self._seen is not None:
            local, owned = (x[:, None] for x in vocabulary.own(self._tokens))
            self._seen.scatter_(1, local, self._seen.gather(1, local) | owned)
        attention = self._attention.at(self._tick, self._lengths, self._since, self._grid)
        hidden = forward.embed(self._tokens)
        hidden = forward.run(0, hidden, forward.rotation_of_text(self._positions), attention)
        logits = vocabulary.logits(hidden, policy.output_weight())
        random = None if sampling.greedy else self._uniforms.index_select(0, self._number)[0]
        choice = choose(logits, vocabulary, sampling, random, self._seen)
        self._table.index_copy_(0, self._number, choice.table()[None])
        self._tokens.copy_(choice.tokens)
        for counter in (self._positions, self._tick, self._number):
            counter.add_(1)

    def drawn(self, ticks: int) -> np.ndarray:
        """Wait for the burst; return [ticks + 1, 3, n] float64: tokens and both log-probs, first tokens first."""
        device.fetch(self._table[: ticks + 1], self._host_table[: ticks + 1])
        return self._host_table[: ticks + 1, :, : self._rows].numpy().copy()


def _split(flat: torch.Tensor, sizes: dict[str, int]) -> dict[str, torch.Tensor]:
    return dict(zip(sizes, flat.split(list(sizes.values())), strict=True))


class _Attention:
    """Attention of one token of every row of a bucket over its prompt's keys and its own."""

    def __init__(self, bucket: Bucket, cache: KvCache) -> None:
        where, size = cache.own.device, cache.size
        self._heads, self._ring = cache.own.shape[2], size.row_tokens
        own = cache.own[:, : bucket.rows]
        self._own = own.unbind(0)  # of each layer [rows, Hkv, keys and values, tokens, D]
        self._own_views = by_layer(own[:, :, :, :, : bucket.own_tokens])
        self._prompt_views = by_layer(cache.prompt[:, : bucket.prompts, :, :, : bucket.prompt_tokens])
        self._columns = torch.arange(bucket.own_tokens, device=where)
        self._places = torch.arange(bucket.prompt_tokens, device=where)
        self._zero, self._never = (torch.tensor(x, dtype=cache.own.dtype, device=where) for x in (0.0, _NEVER))

    def at(self, tick: torch.Tensor, lengths: torch.Tensor, since: torch.Tensor, grid: Grid) -> _AtTick:
        """Return the attention in tick [1], of prompts with `lengths` [P] and rows that see keys `since` a tick [n]."""
        age = (tick - self._columns) % self._ring  # ticks since each column was written
        return _AtTick(
            self._own,
            self._own_views,
            self._prompt_views,
            grid,
            tick % self._ring,
            self._mask(self._places < lengths[:, None]),
            self._mask(age <= (tick - since)[:, None]),
        )

    def _mask(self, seen: torch.Tensor) -> torch.Tensor:
        """Return what is added to scores [slots * Hkv, 1, tokens] where keys are seen [slots, tokens]."""
        mask = torch.where(seen, self._zero, self._never)
        return mask[:, None].expand(-1, self._heads, -1).reshape(-1, 1, seen.shape[1])


@dataclass(frozen=True)
class _AtTick:
    own: tuple[torch.Tensor, ...]
    own_views: tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]
    prompt_views: tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]
    grid: Grid
    column: torch.Tensor  # [1], where this tick's keys go
    prompt_mask: torch.Tensor
    own_mask: torch.Tensor

    def attend(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        """See `rollout.forward.FusedAttend`; the queries are already divided by sqrt(D)."""
        self.own[layer].index_copy_(3, self.column, qkv[:, :, -2:, None])
        q = qkv.flatten(0, 1)[:, :-2]
        prompt = Seen(self.prompt_views[0][layer], self.prompt_views[1][layer], self.prompt_mask)
        own = Seen(self.own_views[0][layer], self.own_views[1][layer], self.own_mask)
        return attend(q, self.grid, prompt, own).view(qkv.shape[0], -1, q.shape[2])
