"""A data worker's side of `prefetch`: samples by reference to prompts in shared memory, one after the other."""

from __future__ import annotations

import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import msgpack  # type: ignore[import-untyped]

from megatron_vlmr1.data import handover, reading
from megatron_vlmr1.data.handover import Part
from megatron_vlmr1.data.prompts import PromptBuilder
from megatron_vlmr1.data.readers import build
from megatron_vlmr1.data.reading import Opens, Reference
from megatron_vlmr1.runtime.children import die_with_parent

_SAY_EVERY_S = 0.5

Tick = Callable[[], None]
Setup = Callable[[bytes, Tick], tuple[PromptBuilder, Opens | None]]


def serve(set_up: Setup) -> None:
    """Serve the rank that started this process with ``CHANNEL PARENT`` as arguments, until it closes the channel.

    Args:
        set_up: makes, of the rank's first message, what builds prompts and what brings shards of URLs; the latter
            calls the tick it is given while it waits for a server.
    """
    channel = socket.socket(fileno=int(sys.argv[1]))
    die_with_parent(int(sys.argv[2]))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # sent to a whole job; the rank decides
        signal.signal(number, signal.SIG_IGN)
    last = 0.0

    def tick() -> None:
        nonlocal last
        if time.monotonic() - last >= _SAY_EVERY_S:
            last = time.monotonic()
            handover.say_busy(channel)

    try:
        message = handover.receive(channel)
        if message is None:
            return
        builder, remote = set_up(handover.body_of(*message[2:]), tick)
        handover.send(channel, handover.READY)
        _work(channel, builder, remote)
    except ValueError as error:
        with suppress(OSError):  # the rank has left already
            handover.send(channel, handover.REFUSED, 0, str(error).encode(errors="replace"))
    except (BrokenPipeError, ConnectionResetError):
        return


def _work(channel: socket.socket, builder: PromptBuilder, remote: Opens | None) -> None:
    """Build what is asked for, one after the other; a thread hands each over while the next one is in the making."""
    sending: Future[None] | None = None
    with ThreadPoolExecutor(1) as sender:
        while (message := handover.receive(channel)) is not None:
            _, position, body, fd = message
            handover.send(channel, handover.BEGUN, position)
            if not body:  # too large for a message
                body, fd = handover.body_of(body, fd), None
            place, shard, digest, key, members = msgpack.unpackb(body, use_list=False, unicode_errors="surrogateescape")
            item = build(builder, position, reading.read(Reference(place, shard, digest, key, members), remote))
            if sending is not None:
                sending.result()
            sending = sender.submit(_hand_over, channel, position, handover.parts_of(item), fd)


def _hand_over(channel: socket.socket, position: int, parts: Sequence[Part], spare: int | None) -> None:
    handover.send(channel, handover.DONE, position, fd=handover.memory(parts, spare))
