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


@dataclass(frozen=True)
class Burst:
    """Ticks in a row in which nobody comes or leaves, as n rows of P prompts stand when it begins."""

    ticks: int
    first: int  # number of its first tick
    entered: int  # rows from here on draw their first token before the first tick
    slots: IntArray  # [n] of the rows' prompts
    since: IntArray  # [n], first tick whose keys each row sees
    tokens: IntArray  # [n], what each row is fed in the first tick; of those that entered, anything
    positions: IntArray  # [n], its M-RoPE position
    uniforms: npt.NDArray[np.float64]  # [ticks + 1, n], in [0, 1), for each token; the first row for first tokens
    lengths: IntArray  # [P], tokens of the prompts, by slot


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

    Where the host is not to be asked after each tick: `let_in`; prefill the prompts that `entering` names and draw a
    token for the rows behind the first `decoding`; `begin_burst`; its ticks; then `take_burst`.
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
        self.tick += 1
        self.let_in()

    def let_in(self) -> None:
        """Let in whoever fits: rows behind the first `decoding`."""
        rows = self._rows
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
            n, rows = self.decoding, self._rows
            lengths = self._lengths()[: len(self._resident) - len(self.entering)]
            self._occupancy = Occupancy(cache, lengths, rows.slot[:n], rows.since[:n])
        return self._occupancy

    def _lengths(self) -> IntArray:
        return np.array([len(self.prompts[i].token_ids) for i in self._resident])

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
            self._leave(np.flatnonzero(ended), stopped, cache)

    def begin_burst(self, most: int) -> Burst:
        """Begin up to `most` ticks, none of them after the last row's limit: perhaps none at all."""
        rows, n = self._rows, self._rows.n
        known = np.arange(n) < self.decoding  # those who have a token
        left = rows.limit[:n] - rows.length[:n] - ~known
        ticks = min(most, int(left.max()))
        first, self.tick = self.tick + 1, self.tick + ticks
        places = np.maximum(rows.length[:n] - 1, 0)
        # What rows draw behind their limits is thrown away.
        drawn = np.minimum(places + np.arange(ticks + 1)[:, None], rows.uniforms.shape[1] - 1)
        return Burst(
            ticks,
            first,
            self.decoding,
            rows.slot[:n].copy(),
            rows.since[:n].copy(),
            rows.tokens[np.arange(n), places],
            rows.start[:n] + places,
            rows.uniforms[np.arange(n), drawn],
            self._lengths(),
        )

    def take_burst(self, tokens: IntArray, logprobs: FloatArray, cache: KvCache) -> None:
        """End a burst with its tokens; what rows drew after their last token is thrown away.

        Args:
            tokens: [ticks + 1, n]; in the first row the first tokens of those who entered, of others anything.
            logprobs: [ticks + 1, 2, n]: at T=1, and under the distribution that was drawn from.
            cache: where the rows' keys lie.
        """
        rows, n, count = self._rows, self._rows.n, len(tokens)
        begins = (np.arange(n) < self.decoding).astype(np.int64)  # number of each row's first new token
        number = np.arange(count)[:, None]
        stops = (tokens[:, :, None] == self._stops).any(2) & (number >= begins)
        stop = np.where(stops.any(0), stops.argmax(0), count)
        last = np.minimum(stop, begins + rows.limit[:n] - rows.length[:n] - 1)
        t, i = np.nonzero((number >= begins) & (number <= last))
        places = rows.length[i] + t - begins[i]
        rows.tokens[i, places] = tokens[t, i]
        rows.logprobs[i, :, places] = logprobs[t, :, i]
        rows.length[:n] += np.minimum(last + 1, count) - begins
        ended = np.flatnonzero(last < count)
        if len(ended):
            self._leave(ended[np.argsort(last[ended], kind="stable")], stop == last, cache)

    def _leave(self, ended: IntArray, stopped: npt.NDArray[np.bool_], cache: KvCache) -> None:
        """Complete rows in the order in which they ended, whether they `stopped` [n] by themselves or not."""
        self._occupancy = None
        for i in ended:
            self._complete(int(i), bool(stopped[i]))
        stays = np.ones(self._rows.n, dtype=np.bool_)
        stays[ended] = False
        self._compact(stays, cache)

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
