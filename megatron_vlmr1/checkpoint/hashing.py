"""sha256 of large files."""

from __future__ import annotations

import hashlib
from pathlib import Path

from megatron_vlmr1.telemetry.progress import mark

_PIECE_BYTES = 64 << 20


def sha256(file: Path) -> bytes:
    """Return the digest of a file, of any size: who hashes for minutes makes progress, and does not hang.

    Raises:
        OSError: it cannot be read.
    """
    total = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(_PIECE_BYTES):
            total.update(piece)
            mark()
    return total.digest()
