"""Continuous batching: which completions are in the cache, what each of them is fed next, and who comes after it.

All of it is bookkeeping on the host that every rank does alike, from nothing but the sampled tokens.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_vlmr1.rollout.cache_size import CacheSize
from megatron_vlmr1.rollout.kv_cache import KvCache, Occupancy
from megatron_vlmr1.rollout.sampling import Sampling, draw, streams
from megatron_vlmr1.types import Completion, FloatArray, IntArray, Prompt

OnFinish = Callable[[int, int, Completion], None]  # prompt index, completion index, completion


@dataclass(frozen=True)
class Request:
    """One completion to be made."""

    prompt: int  # index in the caller's list
    number: int  # of the completion within its group
    limit: int  # most tokens


class _Rows:
    """The completions in the cache, by slot; those in use are the first `n`."""

    def __init__(self, slots: int, max_tokens: int) -> None:
        self.n = 0
        self.prompt, self.number, self.limit, self.slot, self.start, self.length, self.since = (
            np.zeros(slots, dtype=np.int64) for _ in range(7)
        )
        self.uniforms = np.zeros((slots, max_tokens))
        self.tokens = np.zeros((slots, max_tokens), dtype=np.int64)
        self.logprobs = np.zeros((slots, 2, max_tokens), dtype=np.float32)

    def add(self, request: Request, slot: int, prompt: Prompt, tick: int) -> None:
        i = self.n
        self.prompt[i], self.number[i], self.limit[i] = request.prompt, request.number, request.limit
        self.slot[i], self.start[i] = slot, prompt.next_position
        self.length[i], self.since[i] = 0, tick
        self.n += 1

    def move(self, source: IntArray, target: IntArray) -> None:
        for table in vars(self).values():
            if isinstance(table, np.ndarray):
                table[target] = table[source]


class Lane:
    """Completions that are decoded together, in one cache.

    A tick is: `admit`; prefill the prompts that `entering` names and decode the first `decoding` rows; then `take` a
    token for all rows. Who finishes leaves at once, and whoever waits has the place in the next tick.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        requests: Sequence[Request],
        size: CacheSize,
        sampling: Sampling,
        prefill_tokens: int,
        finish: Callable[[int, int, Completion], None],
        decode_text: Callable[[IntArray], str],
    ) -> None:
        """`requests` in order of prompts; at most `prefill_tokens` enter in a tick, or one longer prompt."""
        self.prompts, self.sampling, self.size = prompts, sampling, size
        self.entering: list[int] = []  # prompts of this tick, in order of their slots
        self.tick = -1  # number of this tick
        self.decoding = 0  # rows that are fed a token in this tick; those behind them enter
        self._finish, self._decode_text, self._prefill_tokens = finish, decode_text, prefill_tokens
        self._waiting = deque(requests)
        self._left = Counter(request.prompt for request in requests)  # completions not finished yet
        self._stops = np.array(sorted(sampling.stop_ids), dtype=np.int64)
        self._resident: list[int] = []  # prompts, by slot
        self._rows = _Rows(size.rows, sampling.max_new_tokens)
        self._occupancy: Occupancy | None = None

    @property
    def busy(self) -> bool:
        """Whether there is anything left to do."""
        return bool(self._rows.n or self._waiting)

    @property
    def n(self) -> int:
        """Rows that get a token in this tick."""
        return self._rows.n

    def admit(self) -> None:
        """Begin a tick: let in whoever fits."""
        rows = self._rows
        self.tick += 1
        self.decoding, self.entering = rows.n, []
        tokens = 0
        while self._waiting and rows.n < self.size.rows:
            request = self._waiting[0]
            prompt = self.prompts[request.prompt]
            if request.prompt not in self._resident:
                length = len(prompt.token_ids)
                if len(self._resident) == self.size.prompts or (tokens and tokens + length > self._prefill_tokens):
                    break
                tokens += length
                self._resident.append(request.prompt)
                self.entering.append(request.prompt)
            slot = self._resident.index(request.prompt)
            # Its first key is made in the next tick.
            rows.add(self._waiting.popleft(), slot, prompt, self.tick + 1)
        if rows.n > self.decoding:
            new = np.arange(self.decoding, rows.n)
            positions = np.array([self.prompts[i].position for i in rows.prompt[new]])
            state = streams(self.sampling.seed, positions, rows.number[new])
            rows.uniforms[new] = draw(state[:, None], np.arange(rows.uniforms.shape[1]))

    def entering_slots(self) -> IntArray:
        """Return the slots [P] of the prompts that enter."""
        return np.arange(len(self._resident) - len(self.entering), len(self._resident))

    def new_rows_prompts(self) -> list[int]:
        """Return the prompts of rows that enter: their first token comes from their prompt's last position."""
        return [int(i) for i in self._rows.prompt[self.decoding : self._rows.n]]

    def next_prompt(self) -> int | None:
        """Return the prompt of whoever enters next: the only one that may be in the cache and have others waiting."""
        return self._waiting[0].prompt if self._waiting else None

    def inputs(self) -> tuple[IntArray, IntArray]:
        """Return the last token of each row that is decoded, and its M-RoPE position. [n] each."""
        n, rows = self.decoding, self._rows
        places = rows.length[:n] - 1
        return rows.tokens[np.arange(n), places], rows.start[:n] + places

    def occupancy(self, cache: KvCache) -> Occupancy:
        """Return the rows that are decoded and their prompts."""
        if self._occupancy is None:
            settled = self._resident[: len(self._resident) - len(self.entering)]
            lengths = np.array([len(self.prompts[i].token_ids) for i in settled])
            n, rows = self.decoding, self._rows
            self._occupancy = Occupancy(cache, lengths, rows.slot[:n], rows.since[:n])
        return self._occupancy

    def uniforms(self) -> npt.NDArray[np.float64]:
        """Return a number in [0, 1) for each row's next token [n]."""
        rows = self._rows
        return rows.uniforms[np.arange(rows.n), rows.length[: rows.n]]

    def history(self) -> list[IntArray]:
        """Return each row's tokens, its prompt's and its own."""
        rows = self._rows
        return [
            np.concatenate((self.prompts[rows.prompt[i]].token_ids, rows.tokens[i, : rows.length[i]]))
            for i in range(rows.n)
        ]

    def take(self, tokens: IntArray, logprobs: FloatArray, cache: KvCache) -> None:
        """End a tick with a token for every row; who finishes leaves, and the rest moves together.

        Args:
            tokens: [n].
            logprobs: [2, n]: at T=1, and under the distribution that was drawn from.
            cache: where the rows' keys lie.
        """
        rows, n = self._rows, self._rows.n
        at = np.arange(n), rows.length[:n]
        rows.tokens[at] = tokens
        rows.logprobs[at[0], :, at[1]] = logprobs.T
        rows.length[:n] += 1
        stopped = (tokens[:, None] == self._stops).any(1)
        ended = stopped | (rows.length[:n] >= rows.limit[:n])
        if n > self.decoding:
            self._occupancy = None
        if ended.any():
            self._occupancy = None
            for i in np.flatnonzero(ended):
                self._complete(int(i), bool(stopped[i]))
            self._compact(~ended, cache)

    def _complete(self, row: int, stopped: bool) -> None:
        rows = self._rows
        length = int(rows.length[row])
        ids = rows.tokens[row, :length].copy()
        logprobs, drawn = rows.logprobs[row, :, :length].copy()
        completion = Completion(
            token_ids=ids,
            logprobs=logprobs,
            finish_reason="stop" if stopped else "length",
            text=self._decode_text(ids[:-1] if stopped else ids),
            drawn_logprobs=drawn if self.sampling.changed else None,
        )
        self._left[int(rows.prompt[row])] -= 1
        self._finish(int(rows.prompt[row]), int(rows.number[row]), completion)

    def _compact(self, stays: npt.NDArray[np.bool_], cache: KvCache) -> None:
        source, target = _moves(stays)
        if len(source):
            oldest = int(self._rows.since[: self._rows.n].min())
            cache.move_rows(source, target, cache.columns(oldest, self.tick))
            self._rows.move(source, target)
        self._rows.n = int(stays.sum())
        needed = np.array([self._left[prompt] > 0 for prompt in self._resident])
        source, target = _moves(needed)
        if len(source):
            cache.move_prompts(source, target)
            slots = np.arange(len(self._resident))
            slots[source] = target
            self._rows.slot[: self._rows.n] = slots[self._rows.slot[: self._rows.n]]
            for s, t in zip(source, target, strict=True):
                self._resident[t] = self._resident[s]
        del self._resident[int(needed.sum()) :]


def _moves(stays: npt.NDArray[np.bool_]) -> tuple[IntArray, IntArray]:
    """Return who moves where so that those who stay lie first: the last of them take the first holes."""
    left = int(stays.sum())
    return left + np.flatnonzero(stays[left:]), np.flatnonzero(~stays[:left])
