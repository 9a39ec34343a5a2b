"""Key/value cache of groups: each prompt's keys once, and each completion's own; its size is fixed when it is made.

Prompts and completions lie in slots. Those in use are always the first ones, so that attention reads views: whoever
leaves is replaced by the last one in use.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from megatron_vlmr1.models.attention import AttentionPlan
from megatron_vlmr1.runtime import device
from megatron_vlmr1.types import IntArray

_NEVER = float("-inf")


@dataclass(frozen=True)
class CacheSize:
    """Slots, and tokens of each."""

    prompts: int
    prompt_tokens: int
    rows: int  # a row is a completion
    row_tokens: int

    @property
    def tokens(self) -> int:
        """Tokens of key/value cache in all."""
        return self.prompts * self.prompt_tokens + self.rows * self.row_tokens


def fit(prompt_tokens: int, prompts: int, generations: int, row_tokens: int, budget: int) -> CacheSize | None:
    """Return the largest cache of at most `budget` tokens, or None if not even one completion fits.

    With fewer rows than completions there is one prompt slot more than full groups need: a new prompt can enter while
    the last completions of another are still going on.
    """
    for rows in range(prompts * generations, 0, -1):
        slots = min(prompts, -(-rows // generations) + (rows < prompts * generations))
        size = CacheSize(slots, prompt_tokens, rows, row_tokens)
        if size.tokens <= budget:
            return size
    single = CacheSize(1, prompt_tokens, 1, row_tokens)
    return single if single.tokens <= budget else None


class KvCache:
    """Keys and values of one pipeline stage, Hkv heads of size D on this rank.

    A completion's keys lie in the columns of the ticks that made them, modulo `row_tokens`: all rows write the same
    column, and where a key lies makes no difference to attention. What a row may see is in its mask.
    """

    def __init__(self, size: CacheSize, layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        where = device.device()
        self.size = size
        # Zeros, because what is masked is multiplied by 0, not skipped.
        # [layers, slots, Hkv, keys and values, tokens, D]
        prompts, rows = (size.prompts, kv_heads, 2, size.prompt_tokens), (size.rows, kv_heads, 2, size.row_tokens)
        self.prompt = torch.zeros(layers, *prompts, head_dim, dtype=dtype, device=where)
        self.own = torch.zeros(layers, *rows, head_dim, dtype=dtype, device=where)
        # What is added to a row's scores: 0 where it may see, else -inf.
        self.prompt_mask = torch.full((size.rows, size.prompt_tokens), _NEVER, device=where)
        self.own_mask = torch.full((size.rows, size.row_tokens), _NEVER, device=where)

    @property
    def bytes(self) -> int:
        """Bytes of keys, values and masks."""
        tensors = (self.prompt, self.own, self.prompt_mask, self.own_mask)
        return sum(t.numel() * t.element_size() for t in tensors)

    def open_rows(self, rows: IntArray, prompt_lengths: IntArray) -> None:
        """Let new rows see the first `prompt_lengths` keys of their prompts, and nothing of their own yet."""
        at = _index(rows)
        columns = torch.arange(self.size.prompt_tokens, device=at.device)
        self.prompt_mask[at] = torch.where(columns < _index(prompt_lengths)[:, None], 0.0, _NEVER)
        self.own_mask[at] = _NEVER

    def move_rows(self, source: IntArray, target: IntArray) -> None:
        """Put rows into other slots."""
        s, t = _index(source), _index(target)
        self.own[:, t] = self.own[:, s]
        self.prompt_mask[t] = self.prompt_mask[s]
        self.own_mask[t] = self.own_mask[s]

    def move_prompts(self, source: IntArray, target: IntArray) -> None:
        """Put prompts into other slots."""
        self.prompt[:, _index(target)] = self.prompt[:, _index(source)]


class Prefill:
    """Attention of packed prompts, laid one after another, that keeps their keys and values."""

    def __init__(self, cache: KvCache, plan: AttentionPlan, slots: IntArray, lengths: IntArray) -> None:
        self._cache, self._plan = cache, plan
        self._slots = _index(np.repeat(slots, lengths))  # [T]
        self._places = _index(np.concatenate([np.arange(n) for n in lengths]))  # [T]

    def attend(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        """See `rollout.forward.FusedAttend`."""
        self._cache.prompt[layer][self._slots, :, :, self._places] = qkv[:, :, -2:]
        return self._plan.attend(layer, qkv[:, :, :-2].flatten(1, 2), qkv[:, :, -2], qkv[:, :, -1])


class Grouping:
    """Which prompt each row in use belongs to, as a grid of prompts by rows: a prompt's keys are read once for all."""

    def __init__(self, prompt_of_row: IntArray, prompts: int) -> None:
        """`prompt_of_row` [n] are prompt slots; `prompts` of them are in use."""
        n = len(prompt_of_row)
        order = np.argsort(prompt_of_row, kind="stable")
        counts = np.bincount(prompt_of_row, minlength=prompts)
        self.prompts, self.width = prompts, int(counts.max(initial=0))
        rank = np.arange(n) - np.repeat(np.cumsum(counts) - counts, counts)  # within its group, in order of `order`
        cell = np.empty(n, dtype=np.int64)
        cell[order] = prompt_of_row[order] * self.width + rank
        self._cells: torch.Tensor | None = None  # [n], where each row lies in the grid; None: in order, no holes
        if n != prompts * self.width or not np.array_equal(cell, np.arange(n)):
            rows = np.zeros(prompts * self.width, dtype=np.int64)
            rows[cell] = np.arange(n)
            self._cells, self._rows = _index(cell), _index(rows)

    def to_grid(self, x: torch.Tensor) -> torch.Tensor:
        """[n, Hkv, per, X] -> [prompts, Hkv, width * per, X]; holes repeat some row."""
        if self._cells is not None:
            x = x.index_select(0, self._rows)
        return x.unflatten(0, (self.prompts, self.width)).transpose(1, 2).flatten(2, 3)

    def to_rows(self, x: torch.Tensor, per: int) -> torch.Tensor:
        """[prompts, Hkv, width * per, X] -> [n, Hkv, per, X]."""
        x = x.unflatten(2, (self.width, per)).transpose(1, 2).flatten(0, 1)
        return x if self._cells is None else x.index_select(0, self._cells)


class Decode:
    """Attention of one token of every row in use over its prompt's keys and its own."""

    def __init__(
        self, cache: KvCache, grouping: Grouping, rows: int, prompt_tokens: int, tick: int, oldest: int
    ) -> None:
        """Prepare a tick.

        Args:
            cache: of this stage.
            grouping: prompts of the rows.
            rows: that are decoded: the first ones.
            prompt_tokens: of the longest prompt in use.
            tick: number of this tick.
            oldest: number of the first tick whose keys a row in use still sees.
        """
        tokens = cache.size.row_tokens
        self._rows, self._grouping, self._prompt_tokens = rows, grouping, prompt_tokens
        self._column = tick % tokens
        first = oldest % tokens
        # Columns in use run from the oldest to this one, or round the end: then all of them are read.
        self._columns = slice(first, self._column + 1) if first <= self._column else slice(0, tokens)
        self._prompt = cache.prompt[:, : grouping.prompts, :, :, :prompt_tokens]
        self._own = cache.own[:, :rows]
        cache.own_mask[:rows, self._column] = 0.0
        mask = torch.cat((cache.prompt_mask[:rows, :prompt_tokens], cache.own_mask[:rows, self._columns]), 1)
        self._mask = mask[:, None, None]  # [n, 1, 1, keys]

    def attend(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        """See `rollout.forward.FusedAttend`."""
        own, grouping = self._own[layer], self._grouping
        own[:, :, :, self._column] = qkv[:, :, -2:]
        own_k, own_v = own[:, :, :, self._columns].unbind(2)
        prompt_k, prompt_v = self._prompt[layer].unbind(2)
        q = qkv[:, :, :-2]  # [n, Hkv, per, D]
        per, d = q.shape[2:]
        to_prompt = grouping.to_rows(grouping.to_grid(q) @ prompt_k.transpose(2, 3), per)
        scores = torch.cat((to_prompt, q @ own_k.transpose(2, 3)), dim=-1).float()
        weights = torch.softmax(torch.add(self._mask, scores, alpha=d**-0.5), dim=-1).to(q.dtype)
        at_prompt, at_own = weights.split((self._prompt_tokens, own_k.shape[2]), dim=-1)
        from_prompt = grouping.to_rows(grouping.to_grid(at_prompt) @ prompt_v, per)
        return (from_prompt + at_own @ own_v).flatten(1, 2)


def _index(values: IntArray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64)).to(device.device())
