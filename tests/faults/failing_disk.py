"""A disk that fails: as each checkpoint is written, one rank cannot write one file."""

from __future__ import annotations

import errno
import io
import os
import sys
from pathlib import Path
from typing import Any


def break_disk(plan: list[str]) -> None:
    """Let this rank's saves fail as `plan` says.

    It has one entry for each attempt to save, ``RANK:NAME`` for a file whose name begins with NAME, or ``-`` for an
    attempt that succeeds; attempts after the last entry succeed. ``RANK:tensor`` fails in the middle of the optimizer's
    file, as torch says it.
    """
    import torch

    from megatron_vlmr1.train.checkpoints import Checkpoints

    broken = ""

    def full(path: object) -> bool:
        return bool(broken) and Path(os.fsdecode(str(path))).name.startswith(broken)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.mkdir") and isinstance(arguments[0], str | Path) and full(arguments[0]):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))

    def in_cpp(data: Any, stream: Any, *args: Any, **kwargs: Any) -> None:
        if broken == "tensor" and not isinstance(stream, io.BytesIO):
            raise RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed\nwriting file")
        torch_save(data, stream, *args, **kwargs)

    original, torch_save = Checkpoints.save, torch.save

    def save(self: Checkpoints, *args: Any) -> bool:
        nonlocal broken
        rank, _, name = (plan.pop(0) if plan else "-").partition(":")
        broken = name if rank == os.environ["RANK"] else ""
        try:
            original(self, *args)
            if self._flight is not None:  # threads write, while the disk is broken
                self._flight.save._writes.wait()
                self.poll()
            return self.failures == 0
        finally:
            broken = ""

    Checkpoints.save = save
    torch.save = in_cpp
    sys.addaudithook(audit)
