"""A data worker's side of `prefetch`: samples by reference to prompts in shared memory, one after the other."""

from __future__ import annotations

import signal
import socket
import sys
import time
from collections.abc import Callable

import msgpack  # type: ignore[import-untyped]

from megatron_vlmr1.data import handover, reading
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
            handover.send(channel, handover.BUSY)

    try:
        message = handover.receive(channel)
        if message is None:
            return
        builder, remote = set_up(handover.body_of(*message[2:]), tick)
        handover.send(channel, handover.READY)
        while (message := handover.receive(channel)) is not None:
            _, position, body, fd = message
            place, shard, digest, key, members = msgpack.unpackb(
                handover.body_of(body, fd), use_list=False, unicode_errors="surrogateescape"
            )
            item = build(builder, position, reading.read(Reference(place, shard, digest, key, members), remote))
            handover.send(channel, handover.DONE, position, fd=handover.write_item(item))
    except ValueError as error:
        handover.send(channel, handover.REFUSED, 0, str(error).encode(errors="replace"))
    except (BrokenPipeError, ConnectionResetError):
        return
