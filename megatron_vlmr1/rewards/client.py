"""The trainer's side of the reward service: every rank sends its items and gathers their scores."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Self

import zmq

from megatron_vlmr1.rewards import keys as keys_of
from megatron_vlmr1.rewards import wire
from megatron_vlmr1.rewards.item import RewardItem
from megatron_vlmr1.types import Score

ItemId = int | str

_WINDOW = 512  # items a client has at the service at a time; the rest wait here
_PING_S = 1.0


@dataclass
class _Pending:
    item_id: ItemId
    weights: Mapping[str, float]
    data: bytes
    sent: int | None = None  # how many pings had been sent before it; None: it waits here


class RewardClient:
    """Sends items, gathers scores. One thread; nothing blocks but `collect`, `stats` and `alive`.

    Whatever happens to the service, each submitted item ends up with one `Score`: a client sees from the answers to its
    pings what a restarted service does not know, and sends it again.
    """

    def __init__(self, address: str, keys: Path | None = None) -> None:
        """Connect.

        Args:
            address: of the service.
            keys: folder of CURVE keys, for a service that asks for them.

        Raises:
            ValueError: a key is missing.
        """
        self._pending: dict[int, _Pending] = {}
        self._unsent: deque[int] = deque()
        self._at_service = 0
        self._scores: dict[ItemId, Score] = {}
        self._ids: set[ItemId] = set()  # submitted, not collected
        self._tickets = count(1)
        self._pings = 0
        self._pinged = 0.0  # when the last one was sent
        self._ponged = 0  # the last one that was answered
        self._stats: list[dict[str, Any]] = []
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.IMMEDIATE, 1)  # nothing is queued for a service that is not there
        self._socket.setsockopt(zmq.RECONNECT_IVL, 50)
        if keys is not None:
            keys_of.for_client(self._socket, keys)
        self._socket.connect(address)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def submit(self, item_id: ItemId, item: RewardItem, weights: Mapping[str, float]) -> None:
        """Ask for a score; returns at once.

        Args:
            item_id: the caller's name for it, not in use for another item that is still to be collected.
            item: what is judged.
            weights: weight of each reward by name; the score's value is the weighted sum.
        """
        assert weights, "nothing to score"
        assert item_id not in self._ids, f"item {item_id} is waiting already"
        self._ids.add(item_id)
        data = wire.pack([list(weights), item.to_wire()])
        if len(data) > wire.MAX_ITEM_BYTES:
            self._scores[item_id] = Score(None, failure=f"too_long: more than {wire.MAX_ITEM_BYTES} bytes")
            return
        ticket = next(self._tickets)
        self._pending[ticket] = _Pending(item_id, dict(weights), data)
        self._unsent.append(ticket)
        self._send()

    def poll(self, timeout_s: float = 0.0) -> int:
        """Send what is due, take in what has arrived; return how many items have no score yet.

        Waits up to `timeout_s` for something to arrive.
        """
        self._send()
        if timeout_s > 0:
            self._socket.poll(int(timeout_s * 1000))
        while True:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            self._receive(frames)
        self._send()
        return len(self._pending)

    def collect(self, ids: Iterable[ItemId], timeout: float) -> dict[ItemId, Score]:
        """Wait for the scores of `ids` and hand them over, in that order.

        What has none after `timeout` seconds is a failure, and is forgotten.
        """
        ids = list(ids)
        assert self._ids.issuperset(ids), "collect asks for items that were never submitted"
        end = time.monotonic() + timeout
        missing = {item_id for item_id in ids if item_id not in self._scores}
        while missing and (left := end - time.monotonic()) > 0:
            self.poll(min(left, 0.2))
            missing = {item_id for item_id in missing if item_id not in self._scores}
        if missing:
            late = Score(None, failure=f"no answer from the reward service within {timeout:g} s")
            self._scores.update((item_id, late) for item_id in missing)
            self._forget(missing)
        self._ids.difference_update(ids)
        return {item_id: self._scores.pop(item_id) for item_id in ids}

    def stats(self, timeout: float = 10.0) -> dict[str, Any]:
        """Return the service's figures: process ids, counts, latency, queue depth, failures by reason.

        Raises:
            TimeoutError: no answer within `timeout` seconds.
        """
        self._stats.clear()
        end, asked = time.monotonic() + timeout, 0.0
        while not self._stats:
            now = time.monotonic()
            if now > end:
                raise TimeoutError(f"no answer from the reward service within {timeout:g} s")
            if now - asked > _PING_S and self._try_send([wire.pack(["stats"])]):
                asked = now
            self.poll(0.05)
        return self._stats[-1]

    def alive(self, timeout: float) -> bool:
        """Return whether the service answers a new ping within `timeout` seconds."""
        end, before = time.monotonic() + timeout, self._pings
        while self._ponged <= before and time.monotonic() < end:
            if self._pings == before:
                self._ping()
            self.poll(0.05)
        return self._ponged > before

    def close(self) -> None:
        """Forget everything and disconnect."""
        self._socket.close()
        self._context.term()

    def _send(self) -> None:
        while self._unsent and self._at_service < _WINDOW:
            tickets = [self._unsent[i] for i in range(min(len(self._unsent), _WINDOW - self._at_service))]
            payloads = [self._pending[ticket].data for ticket in tickets]
            if not self._try_send([wire.pack(["score", tickets]), *payloads]):
                break
            for ticket in tickets:
                self._unsent.popleft()
                self._pending[ticket].sent = self._pings
            self._at_service += len(tickets)
        if self._pending and time.monotonic() - self._pinged > _PING_S:
            self._ping()

    def _ping(self) -> None:
        if self._try_send([wire.pack(["ping", self._pings + 1])]):
            self._pings += 1
            self._pinged = time.monotonic()

    def _try_send(self, frames: Sequence[bytes]) -> bool:
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def _receive(self, frames: list[bytes]) -> None:
        header = wire.unpack(frames[0])
        match header:
            case ["scores", list(tickets)]:
                for ticket, data in zip(tickets, frames[1:], strict=True):
                    self._take(ticket, wire.parse_result(data))
            case ["pong", int(number), list(held)]:
                self._ponged = number
                self._send_lost_again(number, set(held))
            case ["stats", dict(stats)]:
                self._stats.append(stats)

    def _take(self, ticket: int, result: wire.Result) -> None:
        pending = self._pending.pop(ticket, None)
        if pending is None:
            return  # answered twice after a restart, or given up by collect
        if pending.sent is not None:
            self._at_service -= 1
        else:
            self._unsent.remove(ticket)
        self._scores[pending.item_id] = _score(result, pending.weights)

    def _send_lost_again(self, ping: int, held: set[int]) -> None:
        """Queue again what was sent before this ping, and was neither answered nor in hand when the ping arrived.

        The socket keeps order both ways, so that an item sent before the ping reached the service before it, and a
        result sent before the pong is already here.
        """
        for ticket, pending in self._pending.items():
            if pending.sent is not None and pending.sent < ping and ticket not in held:
                pending.sent = None
                self._at_service -= 1
                self._unsent.append(ticket)

    def _forget(self, ids: set[ItemId]) -> None:
        for ticket in [ticket for ticket, pending in self._pending.items() if pending.item_id in ids]:
            if self._pending.pop(ticket).sent is not None:
                self._at_service -= 1
            else:
                self._unsent.remove(ticket)


def _score(result: wire.Result, weights: Mapping[str, float]) -> Score:
    if result.failure is not None:
        return Score(None, failure=result.failure)
    if result.parts.keys() != weights.keys():
        return Score(None, failure="invalid result: other parts than asked for")
    return Score(sum(weight * result.parts[name] for name, weight in weights.items()), result.parts)
