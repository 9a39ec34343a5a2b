"""Messages between a rank and its data workers: small ones as they are, prompts in shared memory.

A message is msgpack on a socket that keeps messages apart; a large body travels as an anonymous file in memory whose
descriptor goes along. Such a file has no name: whoever dies, the kernel frees it with the last descriptor. Arrays lie
in it as they are and are never packed; nothing is ever unpickled.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import msgpack  # type: ignore[import-untyped]
import numpy as np
import numpy.typing as npt

from megatron_vlmr1.types import Damage, ImagePatches, Prompt, Sample

REQUEST, READY, BEGUN, BUSY, DONE, REFUSED = range(6)  # kinds of message
_MESSAGE_BYTES = 32 << 10  # larger bodies go into memory
_WAIT_S = 0.02

Item = tuple[Prompt, Sample] | Damage
Part = bytes | npt.NDArray[Any]


def send(channel: socket.socket, kind: int, position: int = 0, body: bytes = b"", fd: int | None = None) -> None:
    """Send a message; `fd` is closed here once it is sent.

    Raises:
        BlockingIOError: the socket does not block and is full.
        OSError: the other side is gone.
    """
    if len(body) > _MESSAGE_BYTES:
        if fd is not None:
            os.ftruncate(fd, 0)  # the length of a body is that of its file
        fd, body = memory([body], fd), b""
    message = msgpack.packb((kind, position, body))
    try:
        if fd is None:
            channel.send(message)
        else:
            _send_fd(channel, message, fd)
    finally:
        if fd is not None:
            os.close(fd)


def say_busy(channel: socket.socket) -> None:
    """Send a sign of life, unless the other side has not taken the earlier ones yet.

    Raises:
        OSError: the other side is gone.
    """
    with suppress(BlockingIOError):
        channel.send(msgpack.packb((BUSY, 0, b"")), socket.MSG_DONTWAIT)


def _send_fd(channel: socket.socket, message: bytes, fd: int) -> None:
    while True:
        try:
            socket.send_fds(channel, [message], [fd])
            return
        except OSError as error:
            if error.errno != errno.ETOOMANYREFS:  # the user's limit of descriptors that lie in sockets
                raise
            time.sleep(_WAIT_S)


def receive(channel: socket.socket) -> tuple[int, int, bytes, int | None] | None:
    """Return (kind, position, body, descriptor if there is one), or None when the other side is gone.

    Raises:
        BlockingIOError: the socket does not block and is empty.
    """
    try:
        message, fds, _, _ = _received(channel)
    except ConnectionError:
        return None
    if not message:
        return None
    kind, position, body = msgpack.unpackb(message)
    return kind, position, body, fds[0] if fds else None


def _received(channel: socket.socket) -> tuple[bytes, list[int], int, Any]:
    try:
        return socket.recv_fds(channel, 2 * _MESSAGE_BYTES, 1)
    except (
        ConnectionResetError
    ):  # told once where the other side left messages unread; its own last ones are still here
        return socket.recv_fds(channel, 2 * _MESSAGE_BYTES, 1)


def body_of(body: bytes, fd: int | None) -> bytes:
    """Return a message's body, from its descriptor where it has one, which is closed."""
    if fd is None:
        return body
    try:
        return os.pread(fd, os.fstat(fd).st_size, 0)
    finally:
        os.close(fd)


def memory(parts: Sequence[Part], spare: int | None = None) -> int:
    """Return the descriptor of an anonymous file in memory with these parts, one after the other.

    `spare` is such a file that nobody needs any more, to be written over: its pages are there already. It may stay
    longer than what is in it.
    """
    fd = os.memfd_create("vlmr1-data", os.MFD_CLOEXEC) if spare is None else spare
    try:
        at = 0
        for part in parts:
            view = _view(part)
            while view:
                count = os.pwrite(fd, view, at)
                view, at = view[count:], at + count
    except BaseException:
        os.close(fd)
        raise
    return fd


def _view(part: Part) -> memoryview:
    return memoryview(part) if isinstance(part, bytes) else part.reshape(-1).view(np.uint8).data


def parts_of(item: Item) -> list[Part]:
    """Return what `read_item` takes, of a prompt with its sample or the damage; the sample's images stay behind."""
    if isinstance(item, Damage):
        return _with_head({"damage": [item.shard, item.key, item.reason, item.too_long]})
    prompt, sample = item
    arrays: list[npt.NDArray[Any]] = [prompt.token_ids, prompt.mrope_positions, *(i.patches for i in prompt.images)]
    head = {
        "shapes": [array.shape for array in arrays],
        "images": [(image.grid_thw, image.size, image.digest.hex()) for image in prompt.images],
        "prompt": [prompt.position, prompt.key, prompt.question, prompt.truth, prompt.accuracy],
        "sample": [sample.key, sample.question, sample.solution, dict(sample.extra)],
    }
    return [*_with_head(head), *map(np.ascontiguousarray, arrays)]


def _with_head(head: dict[str, Any]) -> list[Part]:
    text = json.dumps(head).encode()
    return [len(text).to_bytes(8, "little"), text]


def read_item(fd: int) -> Item:
    """Return the item whose `parts_of` lie in memory.

    Raises:
        ValueError: the memory is shorter than it says.
    """
    size = int.from_bytes(os.pread(fd, 8, 0), "little")
    head = json.loads(os.pread(fd, size, 8))
    if "damage" in head:
        return Damage(*head["damage"])
    at, arrays = 8 + size, []
    for number, shape in enumerate(head["shapes"]):
        arrays.append(_array(fd, shape, np.dtype(np.int64 if number < 2 else np.float32), at))
        at += arrays[-1].nbytes
    token_ids, mrope_positions, *patches = arrays
    images = tuple(
        ImagePatches(array, (grid[0], grid[1], grid[2]), (size[0], size[1]), bytes.fromhex(digest))
        for array, (grid, size, digest) in zip(patches, head["images"], strict=True)
    )
    position, key, question, truth, accuracy = head["prompt"]
    prompt = Prompt(position, key, token_ids, mrope_positions, images, question, truth, accuracy)
    key, question, solution, extra = head["sample"]
    return prompt, Sample(key, question, solution, (), extra)


def _array(fd: int, shape: list[int], dtype: np.dtype[Any], at: int) -> npt.NDArray[Any]:
    array = np.empty(shape, dtype)
    view = _view(array)
    while view:
        count = os.preadv(fd, [view], at)
        if not count:
            raise ValueError("memory of a data worker is shorter than it says")
        view, at = view[count:], at + count
    return array
