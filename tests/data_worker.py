"""A data worker without a tokenizer, which starts at once: its prompts say which sample they were made of."""

from __future__ import annotations

import multiprocessing
import socket
import subprocess
from typing import Any

import numpy as np

from megatron_vlmr1.data import handover
from megatron_vlmr1.data.serve import _work, serve
from megatron_vlmr1.types import Prompt, Sample


class KeysOnly:
    """Builds prompts of no tokens to speak of."""

    def build(self, position: int, sample: Sample) -> Prompt:
        ids = np.array([len(sample.key)])
        return Prompt(position, sample.key, ids, np.zeros((3, 1), np.int64), (), sample.question, sample.solution)


class Forked:
    """A worker that does not import anything, for tests that start hundreds; looks like one of `subprocess`."""

    def __init__(self, channel: socket.socket) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._process = context.Process(target=_serve_keys, args=(channel,), daemon=True)
        self._process.start()
        self.pid, self.kill = self._process.pid, self._process.kill

    def wait(self, timeout: float | None = None) -> int:
        """Return its exit code."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("worker", timeout or 0.0)
        return self._process.exitcode


def _serve_keys(channel: socket.socket) -> None:
    builder: Any = KeysOnly()
    handover.receive(channel)
    handover.send(channel, handover.READY)
    _work(channel, builder, None)


if __name__ == "__main__":
    builder: Any = KeysOnly()
    serve(lambda message, tick: (builder, None))
