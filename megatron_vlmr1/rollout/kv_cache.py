"""Key/value cache of groups: each prompt's keys once, and each completion's own; its size is fixed when it is made.

Prompts and completions lie in slots. Those in use are always the first ones, so that attention reads views: whoever
leaves is replaced by the last one in use.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from megatron_vlmr1.models.attention import AttentionPlan
from megatron_vlmr1.rollout.cache_size import CacheSize
from megatron_vlmr1.runtime import device
from megatron_vlmr1.types import IntArray

_NEVER = float("-inf")


class KvCache:
    """Keys and values of one pipeline stage, Hkv heads of size D on this rank.

    A completion's keys lie in the columns of the ticks that made them, modulo `row_tokens`: all rows write the same
    column, and where a key lies makes no difference to attention. Which of them a row may see follows from their age.
    """

    def __init__(self, size: CacheSize, layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        where = device.device()
        self.size = size
        # Zeros, because what is masked is multiplied by 0, not skipped.
        # [layers, slots, Hkv, keys and values, tokens, D]
        prompts, rows = (size.prompts, kv_heads, 2, size.prompt_tokens), (size.rows, kv_heads, 2, size.row_tokens)
        self.prompt = torch.zeros(layers, *prompts, head_dim, dtype=dtype, device=where)
        self.own = torch.zeros(layers, *rows, head_dim, dtype=dtype, device=where)

    @property
    def bytes(self) -> int:
        """Bytes of keys and values."""
        return self.prompt.nbytes + self.own.nbytes

    def columns(self, oldest: int, tick: int) -> slice:
        """Return the columns in use from one tick to another, or all of them where those run round the end."""
        tokens = self.size.row_tokens
        first, last = oldest % tokens, tick % tokens
        return slice(first, last + 1) if first <= last and tick - oldest < tokens else slice(0, tokens)

    def move_rows(self, source: IntArray, target: IntArray, columns: slice) -> None:
        """Put rows, of which only some columns are in use, into other slots."""
        s, t = _index(source), _index(target)
        own = self.own[:, :, :, :, columns]
        own[:, t] = own[:, s]

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


class Grid(NamedTuple):
    """How rows lie side by side by prompts, whose keys are then read once for all their rows.

    Entries are (row, key/value head) pairs: the grid goes [prompts, Hkv, width], and holes repeat some row.
    """

    pairs: torch.Tensor  # [P * Hkv * width], the entry in each cell
    cells: torch.Tensor  # [n * Hkv], the cell of each entry
    batches: int  # P * Hkv

    def to_grid(self, x: torch.Tensor) -> torch.Tensor:
        """[n * Hkv, per, X] -> [P * Hkv, width * per, X]."""
        return x.index_select(0, self.pairs).view(self.batches, -1, x.shape[2])

    def to_rows(self, x: torch.Tensor, per: int) -> torch.Tensor:
        """[P * Hkv, width * per, X] -> [n * Hkv, per, X]."""
        return x.view(-1, per, x.shape[2]).index_select(0, self.cells)


def grid_numbers(prompt_of_row: IntArray, prompts: int, width: int, heads: int) -> tuple[IntArray, IntArray]:
    """Return `Grid.pairs` and `Grid.cells` of rows [n], by the slots of their prompts; none has more than `width`."""
    rows = len(prompt_of_row)
    counts = np.bincount(prompt_of_row, minlength=prompts)
    place = np.empty(rows, dtype=np.int64)  # within its group
    order = np.argsort(prompt_of_row, kind="stable")
    place[order] = np.arange(rows) - np.repeat(np.cumsum(counts) - counts, counts)
    grid = np.zeros((prompts, width), dtype=np.int64)
    grid[prompt_of_row, place] = np.arange(rows)
    head = np.arange(heads)
    pairs = (grid[:, None] * heads + head[:, None]).reshape(-1)
    return pairs, ((prompt_of_row[:, None] * heads + head) * width + place[:, None]).reshape(-1)


class Occupancy:
    """Which rows are decoded, of which prompts: the same from tick to tick until somebody comes or leaves."""

    def __init__(self, cache: KvCache, lengths: IntArray, prompt_of_row: IntArray, since: IntArray) -> None:
        """Look at the first rows and prompts of a cache.

        Args:
            cache: of this stage.
            lengths: tokens [P] of the prompts, by slot.
            prompt_of_row: slot [n] of each row's prompt.
            since: first tick [n] whose keys each row sees.
        """
        self.rows, prompts, heads = len(prompt_of_row), len(lengths), cache.own.shape[2]
        width = int(np.bincount(prompt_of_row).max())
        pairs, cells = grid_numbers(prompt_of_row, prompts, width, heads)
        self.grid = Grid(_index(pairs), _index(cells), prompts * heads)
        tokens = int(lengths.max())  # of the longest prompt
        self.keys, self.values = by_layer(cache.prompt[:, :prompts, :, :, :tokens])
        self.mask = None  # [P * Hkv, 1, tokens]
        if (lengths != tokens).any():
            self.mask = _mask(np.arange(tokens) < lengths[:, None], cache)
        self.since = since
        self.oldest = int(since.min())
        self.alike = bool((since == self.oldest).all())  # whether all rows see equally many of their own keys


def by_layer(x: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Return of each layer keys [slots * Hkv, D, tokens] and values [slots * Hkv, tokens, D], views of a cache.

    All layers at once: in a tick of few rows, taking views layer by layer takes longer than the kernels.
    """
    x = x.flatten(1, 2)
    return x[:, :, 0].transpose(2, 3).unbind(0), x[:, :, 1].unbind(0)


class Seen(NamedTuple):
    """Keys [B, D, tokens], values [B, tokens, D], and what is added to scores [B, 1, tokens]; None: nothing."""

    keys: torch.Tensor
    values: torch.Tensor
    mask: torch.Tensor | None


def attend(q: torch.Tensor, grid: Grid, prompt: Seen, own: Seen) -> torch.Tensor:
    """Attention of q [n * Hkv, per, D], divided by sqrt(D), over prompts' keys, in the grid, and the rows' own."""
    per = q.shape[1]
    at_prompt = grid.to_rows(_scores(grid.to_grid(q), prompt), per)
    scores = torch.cat((at_prompt, _scores(q, own)), dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).type_as(q)
    at_prompt, at_own = weights.split((prompt.keys.shape[2], own.keys.shape[2]), dim=-1)
    from_prompt = grid.to_rows(torch.bmm(grid.to_grid(at_prompt), prompt.values), per)
    return torch.baddbmm(from_prompt, at_own, own.values)


def _scores(q: torch.Tensor, seen: Seen) -> torch.Tensor:
    return torch.bmm(q, seen.keys) if seen.mask is None else torch.baddbmm(seen.mask, q, seen.keys)


class Decode:
    """Attention of one token of every row in use over its prompt's keys and its own, in one tick."""

    def __init__(self, cache: KvCache, occupancy: Occupancy, tick: int) -> None:
        """`tick` is its number."""
        tokens = cache.size.row_tokens
        columns = cache.columns(occupancy.oldest, tick)
        used = columns.stop - columns.start
        own = cache.own[:, : occupancy.rows]
        self._occupancy = occupancy
        self._new = own[:, :, :, :, tick % tokens].unbind(0)  # of each layer [n, Hkv, keys and values, D]
        self._keys, self._values = by_layer(own[:, :, :, :, columns])
        self._mask = None  # [n * Hkv, 1, tokens]
        if not occupancy.alike or used > tick + 1 - occupancy.oldest:
            age = (tick - np.arange(columns.start, columns.stop)) % tokens  # ticks since each column was written
            self._mask = _mask(age <= tick - occupancy.since[:, None], cache)

    def attend(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        """See `rollout.forward.FusedAttend`; the queries are already divided by sqrt(D)."""
        prompts = self._occupancy
        self._new[layer].copy_(qkv[:, :, -2:])
        q = qkv.flatten(0, 1)[:, :-2]  # rows and heads are one dimension from here on: [n * Hkv, ...]
        prompt = Seen(prompts.keys[layer], prompts.values[layer], prompts.mask)
        own = Seen(self._keys[layer], self._values[layer], self._mask)
        return attend(q, prompts.grid, prompt, own).view(prompts.rows, -1, q.shape[2])


def _mask(seen: npt.NDArray[np.bool_], cache: KvCache) -> torch.Tensor:
    """Return what is added to scores [slots * Hkv, 1, tokens]: 0 where a key is seen [slots, tokens], else -inf."""
    heads, dtype = cache.own.shape[2], cache.own.dtype
    mask = torch.from_numpy(np.where(seen, 0.0, _NEVER).repeat(heads, 0)[:, None])
    return mask.to(device.device(), dtype)


def _index(values: IntArray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64)).to(device.device())
