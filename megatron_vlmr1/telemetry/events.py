"""Scalars for TensorBoard, written in the caller's thread.

TensorBoard's own writers queue to a thread, so that a full disk shows up at some later call or as a traceback of
that thread; here the call that fails is the one that raises.
"""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from megatron_vlmr1.telemetry.lines import write_whole


class ScalarEvents:
    """One event file in `directory`, from `first_step` on.

    TensorBoard forgets points of earlier files at and after `first_step`, so a resumed run shows each step once.

    Raises:
        ImportError: the tensorboard package is missing.
    """

    def __init__(self, directory: Path, first_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        now = time.time()
        # Readers go through the files in the order of their names.
        self._path = directory / f"events.out.tfevents.{time.time_ns():020d}.{socket.gethostname()}.{os.getpid()}"
        first = Event(wall_time=now, file_version="brain.Event:2")
        start = Event(wall_time=now, step=first_step, session_log=SessionLog(status=SessionLog.START))
        self._head = _record(first.SerializeToString()) + _record(start.SerializeToString())

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add one point to each metric's curve, or none.

        Raises:
            OSError: the disk is full or fails.
        """
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=values))
        data = _record(event.SerializeToString())
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Reopened each time: a disk that came back is found again.
        with self._path.open("ab", buffering=0) as file:
            write_whole(file, data if file.tell() else self._head + data)


def _record(data: bytes) -> bytes:
    from tensorboard.summary.writer.record_writer import RecordWriter

    out = io.BytesIO()
    RecordWriter(out).write(data)
    return out.getvalue()
